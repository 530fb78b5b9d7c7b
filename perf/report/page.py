"""index.html: a single file that works from the disk and makes no network requests.

Values of saved runs are data: the template escapes them, and a content security policy allows only the page's own script,
by its hash, and no requests.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from perf.report import summary, tables
from perf.report.canvas import INK, PAPER, RULE, Mark, Plot
from perf.report.charts import SECTIONS, groups
from perf.report.palette import KERNEL_CLASSES
from perf.report.reproduce import command
from perf.report.results import Facets, SavedSession, ranked
from perf.report.text import file_name, seconds
from perf.runs.saved_run import BaselineError
from perf.runs.storage import write_atomically

LARGEST_BYTES = 6_000_000
HERE = Path(__file__).parent
FACTS = {
    "name": "device",
    "uuid": "UUID",
    "driver": "driver",
    "torch": "torch",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "triton": "triton",
    "xformers": "xFormers",
    "python": "Python",
    "memory_bytes": "memory, bytes",
    "power_limit_watts": "power limit, W",
    "sm_clock_max_mhz": "largest SM clock, MHz",
    "memory_clock_max_mhz": "largest memory clock, MHz",
    "clock": "clock",
    "threads": "threads of torch",
    "isolated": "each launch a fresh process",
}
THEME = {INK: "var(--ink)", RULE: "var(--line)", PAPER: "var(--page)"}


def write(report, plots: Sequence[Plot], folder: Path) -> list[Path]:
    """Write index.html of a build.Report, and into runs/ the raw JSON that exceeds its size. Raises BaselineError."""
    facets = [result.facets for result in report.current]
    facets += [point.facets for chart in report.charts for point in chart.points if point.facets]
    numbers = {facet: number for number, facet in enumerate(dict.fromkeys(facets))}
    context = {
        "report": report,
        "plots": [(plot.chart, inline_svg(plot, numbers)) for plot in plots],
        "facets": list(map(vars, numbers)),
        "numbers": numbers,
        "script": Markup((HERE / "page.js").read_text(encoding="utf-8")),
        "style": Markup((HERE / "page.css").read_text(encoding="utf-8")),
        **_contents(report),
    }
    context["script_hash"] = base64.b64encode(hashlib.sha256(context["script"].encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("page.html")
    room = LARGEST_BYTES - len(template.render(context, raw=[], beside=[]).encode())
    raw, beside = _raw(report.sessions, room)
    for name, document in beside.items():
        write_atomically(folder / "runs" / name, document)
    page = template.render(context, raw=raw, beside=list(beside))
    if len(page.encode()) > LARGEST_BYTES:
        raise BaselineError(f"{folder}: the page would exceed {LARGEST_BYTES / 1e6:g} MB; report on fewer runs at once")
    write_atomically(folder / "index.html", page)
    return [folder / "index.html", *(folder / "runs" / name for name in beside)]


def _contents(report) -> dict:
    """Headline and tables for the template."""
    results = ranked(report.current)
    last = max(report.sessions, key=lambda session: session.order, default=None)
    fastest = summary.fastest([result for result in report.results if result.session is last])
    classes = tuple(KERNEL_CLASSES)
    traces = [
        (result, [seconds(result.trace[name]) if name in result.trace else "" for name in classes])
        for result in results
    ]
    machines = groups(report.sessions, lambda session: session.identity).values()
    return {
        "headline": f"{last.name}: {summary.headline(last, report.results)}" if last else "",
        "fastest": f"{fastest[0].upper()}{fastest[1:]}." if fastest else "",
        "synthetic": [session.synthetic for session in report.sessions if session.synthetic],
        "sections": SECTIONS,
        "results": list(zip(results, tables.result_rows(results))),
        "columns": tables.COLUMNS,
        "parts": {
            "Stages": ("seconds per image", tables.STAGE_NAMES, tables.stage_rows(results)),
            "Kernels": ("one traced round", classes, [(result, cells) for result, cells in traces if result.trace]),
        },
        "commands": [(result, command(result)) for result in results],
        "machines": [(_machine_title(sessions), _machine_facts(sessions[0])) for sessions in machines],
        "anchor": lambda name: file_name(name.lower()),
    }


def _machine_title(sessions: Sequence[SavedSession]) -> str:
    first = sessions[0]
    if len(sessions) > 1:
        return f"{first.machine}: {len(sessions)} sessions"
    when = (
        f"{datetime.fromtimestamp(first.started, timezone.utc):%Y-%m-%d %H:%M} UTC" if first.started else "unknown time"
    )
    return f"{first.machine}: session {first.name}, {when}"


def _machine_facts(session: SavedSession) -> list[tuple[str, str]]:
    rows = []
    for key, name in FACTS.items():
        value = session.facts.get(key)
        rows.append((name, "unknown" if value is None else f"{value:.10g}" if isinstance(value, float) else str(value)))
    rows += [(f"measured {dtype}", f"{rate / 1e12:.3g} TFLOP/s") for dtype, rate in session.ceilings.items()]
    if session.copy_bytes_per_second:
        rows.append(("measured copy, read and written", f"{session.copy_bytes_per_second / 1e9:.4g} GB/s"))
    return rows


def inline_svg(plot: Plot, numbers: dict[Facets, int]) -> Markup:
    """The SVG element of a plot for HTML: with the page's colours, facets to filter by, and tooltips, and without its title.

    matplotlib escapes <, > and quotes in texts and attributes, so that its tags can be told from texts.
    """
    drawing = re.search(r'<g id="figure_1">.*</svg>', plot.svg, flags=re.DOTALL)[0]
    drawing = re.sub(r'<g id="title">.*?</g>', "", drawing, flags=re.DOTALL)

    def compact(match: re.Match) -> str:
        tag = re.sub(r' (?:id="[\w.]+_\d+"|transform="rotate\(-0 [^"]*")', "", match[0])
        tag = re.sub(r"#[0-9a-f]{6}\b", lambda colour: THEME.get(colour[0], colour[0]), tag)
        tag = re.sub(r' (?:d|x|y)="[^"]*"', lambda numbers: re.sub(r"(\.\d)\d+|\n", r"\1", numbers[0]), tag)
        tag = re.sub(r"font-family: [^;]*; ", "", tag)
        return re.sub(r' id="(mark-\d+)">', lambda id: _attributes(plot.marks[id[1]], numbers), tag)

    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', plot.svg).groups())
    box = f"0 {plot.title_height:g} {width:g} {height - plot.title_height:g}"
    drawing = re.sub(r">\s+<", "><", re.sub(r"</?[a-z][^>]*>", compact, drawing))
    return Markup(f'<svg viewBox="{box}">{drawing}')


def _attributes(mark: Mark, numbers: dict[Facets, int]) -> str:
    facets = " ".join(str(numbers[facets]) for facets in mark.facets)
    attribute = f' data-{"legend" if mark.legend else "facets"}="{facets}"' if facets else ""
    return f"{attribute}>" + (f"<title>{escape(mark.title)}</title>" if mark.title else "")


def _raw(sessions: Sequence[SavedSession], room: int) -> tuple[list[dict], dict[str, str]]:
    """The runs' JSON: compressed for the page, newest first, up to `room` bytes, and the others by file name."""
    inside, beside, names = [], {}, set()
    for session in sorted(sessions, key=lambda session: -session.started):
        stem = name = file_name(session.saved.path.stem)
        while name in names:
            name = f"{stem}-{len(names)}"
        names.add(name)
        document = json.dumps(session.document, indent=1)
        packed = base64.b64encode(gzip.compress(document.encode(), mtime=0)).decode()
        if len(packed) + 500 <= room:
            room -= len(packed) + 500
            inside.append({"name": f"{name}.json", "gzip": packed})
        else:
            room -= 500
            beside[f"{name}.json"] = document
    return inside, beside
