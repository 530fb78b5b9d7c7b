"""index.html: one file that opens from the disk and asks for nothing else.

Whatever comes from a saved run is data: escaped in the document, and in scripts inside JSON that can end no element. A
policy in the page lets only its own two scripts run, by their hashes, and nothing be fetched.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.util
import json
from html import escape
from pathlib import Path

from perf.report import sections
from perf.report.charts import Chart
from perf.report.palette import VERDICTS
from perf.report.results import Facets
from perf.runs.saved_run import BaselineError
from perf.runs.storage import write_atomically

LARGEST_BYTES = 6_000_000
HERE = Path(__file__).parent
MARGIN_BYTES = 20_000


def plotly_script() -> str:
    """plotly.js as its Python package ships it, read without importing the package. Raises BaselineError without it."""
    found = importlib.util.find_spec("plotly")
    path = Path(found.origin).parent / "package_data" / "plotly.min.js" if found and found.origin else None
    if path is None or not path.is_file():
        raise BaselineError('plotly.js is not there: pip install "sd-perf[report]"')
    script = path.read_text(encoding="utf-8")
    if "</script" in script.lower() or "<!--" in script:
        raise BaselineError(f"{path}: this plotly.js cannot stand inside a page; install another version of plotly")
    return script


def embedded(value: object) -> str:
    """JSON that cannot leave the element it stands in: no <, > or & in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


class FacetIndex:
    """Facets by number, since thousands of points have the same few."""

    def __init__(self):
        self.numbers: dict[Facets, int] = {}

    def __call__(self, facets: Facets | None) -> int | None:
        if facets is None:
            return None
        return self.numbers.setdefault(facets, len(self.numbers))

    def as_list(self) -> list[list[str]]:
        """Ready for JSON."""
        return [[one.model, one.gpu, one.batch, one.torch, one.attention] for one in self.numbers]


def chart_data(chart: Chart, index: FacetIndex) -> dict:
    """A chart as page.js reads it; a point is [x, y, low, high, facets, note, base, verdict]."""
    series = [
        {
            "name": one.name,
            "look": one.look,
            "form": one.form,
            "band": one.band,
            "faint": one.faint,
            "points": [
                [
                    point.x,
                    _short(point.y),
                    _short(point.low),
                    _short(point.high),
                    index(point.facets),
                    point.note,
                    _short(point.base),
                    point.verdict,
                ]
                for point in one.points
            ],
        }
        for one in chart.series
    ]
    keys = ("title", "x_label", "y_label", "scale", "y_log", "stacked", "zero", "levels", "marks", "places")
    return {**{key: getattr(chart, key) for key in keys}, "labelled": chart.labelled_marks, "series": series}


def _short(value: float | None) -> float | None:
    """Seven digits are more than any clock here has."""
    return None if value is None else float(f"{value:.7g}")


def write(report, folder: Path) -> list[Path]:
    """Write index.html, and beside it in runs/ the raw JSON that it has no room for. Raises BaselineError."""
    index = FacetIndex()
    charts = [chart_data(chart, index) for chart in report.charts]
    body = sections.body(report, index)
    data = {
        "facets": index.as_list(),
        "charts": charts,
        "looks": report.palette.as_dict(),
        "verdicts": {verdict.value: colour for verdict, (colour, _) in VERDICTS.items()},
    }
    scripts = plotly_script(), (HERE / "page.js").read_text(encoding="utf-8")
    style = (HERE / "page.css").read_text(encoding="utf-8")
    room = LARGEST_BYTES - MARGIN_BYTES
    room -= sum(map(len, map(str.encode, (*scripts, style, body, embedded(data)))))
    raw, beside = _raw(report, room)
    written = []
    for name, text in beside.items():
        write_atomically(folder / "runs" / name, text)
        written.append(folder / "runs" / name)
    downloads = sections.downloads(report, [one["name"] for one in raw], beside)
    page = document(body + downloads, style, embedded({**data, "raw": raw}), scripts)
    if len(page.encode()) > LARGEST_BYTES:
        raise BaselineError(f"{folder}: the page would pass {LARGEST_BYTES / 1e6:g} MB; report on fewer runs at once")
    write_atomically(folder / "index.html", page)
    return [folder / "index.html", *written]


def _raw(report, room: int) -> tuple[list[dict], dict[str, str]]:
    """The runs' JSON, compressed, newest first as far as there is room, and the others' text by file name."""
    kept, beside, names = [], {}, set()
    for session in sorted(report.sessions, key=lambda one: -one.started):
        name = _own_name(sections.raw_name(session), names)
        text = json.dumps(session.document, indent=1)
        packed = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
        if len(packed) + 200 <= room:
            room -= len(packed) + 200
            kept.append({"name": name, "gzip": packed})
        else:
            beside[name] = text
    return kept, beside


def _own_name(name: str, taken: set[str]) -> str:
    stem, number, found = name.removesuffix(".json"), 1, name
    while found in taken:
        number += 1
        found = f"{stem}-{number}.json"
    taken.add(found)
    return found


def document(body: str, style: str, data: str, scripts: tuple[str, str]) -> str:
    """The page around its parts. body: HTML that is escaped already; data: what `embedded` gave."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"
    policy += "; form-action 'none'"
    return f"""<!DOCTYPE html>
<html lang="en" data-theme="light">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>sd-perf report</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{body}
<script type="application/json" id="data">{data}</script>
<script>{scripts[0]}</script>
<script>{scripts[1]}</script>
</body>
</html>
"""
