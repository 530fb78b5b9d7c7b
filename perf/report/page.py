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

from perf.report import answer, summary, tables
from perf.report.canvas import INK, PAPER, RULE, Mark, Plot
from perf.report.charts import SECTIONS, Chart, groups
from perf.report.palette import KERNEL_CLASSES
from perf.report.results import Facets, SavedSession
from perf.report.text import file_name, seconds, size
from perf.runs.saved_run import BaselineError
from perf.runs.storage import write_atomically

LARGEST_BYTES = 11 << 19  # 5.5 MiB
RAW_BYTES = 1_000_000  # of the page, kept for raw JSON where the charts would take it all
ROWS_AT_ONCE = 30  # of a table, before the reader asks for all
HERE = Path(__file__).parent
FACTS = {
    "name": "device",
    "processor": "processor",
    "uuid": "UUID",
    "driver": "driver",
    "torch": "torch",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "triton": "triton",
    "xformers": "xFormers",
    "python": "Python",
    "memory_bytes": "memory",
    "power_limit_watts": "power limit, W",
    "sm_clock_max_mhz": "largest SM clock, MHz",
    "memory_clock_max_mhz": "largest memory clock, MHz",
    "clock": "clock",
    "threads": "threads of torch",
    "isolated": "each launch a fresh process",
}
TERMS = {
    "round": "One timed call of the workload: a prompt in, the pixels of a batch of images out.",
    "launch": "A fresh process with a warm-up and several rounds. The unit of replication, since rounds of one process are alike.",
    "session": "One run of pytest perf: all configurations, whose launches or rounds alternate.",
    "interval": "95 % confidence interval of the median launch; below 3 launches the range of the rounds.",
    "speed-up": "Time of the reference attention over that of the row, from rounds of both that alternate in one session.",
    "verdict": "Time of the row against its baseline or the other commit, with the 95 % interval of the change.",
    "margin": "The smallest change that counts, from the noise of the machine.",
    "SLOWER": "The whole interval of the change lies beyond the margin: a regression.",
    "FASTER": "The whole interval of the change lies beyond the margin: an improvement.",
    "SAME": "The whole interval lies within twice the margin around no change.",
    "INCONCLUSIVE": "The interval allows both a change and none: measure more launches.",
    "INVALID": "The times are no evidence: a wrong image, throttling, another process, or a control arm that differs.",
    "COUNTS": "Operators, bytes, kernels, graph breaks, recompiles or host waits differ: exact, without noise.",
    "drifted": "The reference workload changed its speed within the session: absolute times are approximate, ratios are not.",
    "approximate": "A technique that changes the image by design: never called the fastest.",
    "fastest": "The interval of the ratio to the second fastest excludes no change.",
    "image": "PSNR of the image against its fp32 reference in decibels: the higher, the more alike.",
    "peak memory": "The largest memory in use during a round: allocated on the device, or resident on a CPU.",
    "reference workload": "A fixed computation beside every round that measures the speed of the machine.",
    "change point": "The first session of a new level of time, by PELT over the stored sessions of a machine.",
}
THEME = {INK: "var(--ink)", RULE: "var(--line)", PAPER: "var(--page)"}


def write(report, plots: Sequence[Plot], folder: Path) -> list[Path]:
    """Write index.html of a build.Report, and into runs/ the raw JSON that exceeds its size. Raises BaselineError."""
    facets = [result.facets for result in report.current]
    facets += [point.facets for chart in report.charts for point in chart.points if point.facets]
    numbers = {facet: number for number, facet in enumerate(dict.fromkeys(facets))}
    works = answer.work_tables(report.current)
    rows = [row for work in works for row in work.rows]
    script = Markup((HERE / "page.js").read_text(encoding="utf-8"))
    context = {
        "report": report,
        "facets": list(map(vars, numbers)),
        "numbers": numbers,
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "style": Markup((HERE / "page.css").read_text(encoding="utf-8")),
        "works": works,
        "packed": _packed(
            {
                "records": [tables.result_record(row.result) for row in rows],
                "details": [answer.details(row) for row in rows],
                "pairs": {key: ratio for work in works for key, ratio in answer.pairs(work.rows).items()},
            }
        ),
        **_contents(report, rows),
    }
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("page.html")
    bare = len(template.render(context, plots=_drawings(plots, numbers, 0), raw=[], beside=[]).encode())
    context["plots"] = _drawings(plots, numbers, LARGEST_BYTES - RAW_BYTES - bare)
    room = LARGEST_BYTES - len(template.render(context, raw=[], beside=[]).encode())
    raw, beside = _raw(report.sessions, room)
    for name, document in beside.items():
        write_atomically(folder / "runs" / name, document)
    page = template.render(context, raw=raw, beside=list(beside))
    if len(page.encode()) > LARGEST_BYTES:
        raise BaselineError(
            f"{folder}: the page would exceed {LARGEST_BYTES / 2**20:g} MiB; report on fewer runs at once"
        )
    write_atomically(folder / "index.html", page)
    return [folder / "index.html", *(folder / "runs" / name for name in beside)]


def _drawings(plots: Sequence[Plot], numbers: dict[Facets, int], room: int) -> list[tuple[Chart, Markup | None, str]]:
    """Each chart with its SVG, None where `room` bytes are used up, and the path of its file beside the page."""
    drawings = []
    for plot in plots:
        drawing = inline_svg(plot, numbers) if room > 0 else None
        room -= len(drawing.encode()) if drawing else 0
        drawings.append((plot.chart, drawing if room >= 0 else None, f"plots/{plot.paths[1].name}"))
    return drawings


def _packed(value: object) -> str:
    """JSON, compressed and in base64."""
    return base64.b64encode(gzip.compress(json.dumps(value).encode(), mtime=0)).decode()


def _contents(report, rows: Sequence[answer.Row]) -> dict:
    """The answer, its explanation and the further tables for the template."""
    results = [row.result for row in rows]
    last = max(report.sessions, key=lambda session: session.order, default=None)
    fastest = summary.fastest([result for result in report.results if result.session is last])
    classes = tuple(KERNEL_CLASSES)
    traces = [
        (result, [seconds(result.trace[name]) if name in result.trace else "" for name in classes])
        for result in results
    ]
    latest = answer.latest(rows)
    cards = answer.cards(latest)
    machines = groups(report.sessions, lambda session: session.identity).values()
    return {
        "last": last,
        "headline": summary.headline(last, report.results) if last else "",
        "asked": answer.asked(last, report.results, len(report.sessions)) if last else [],
        "cards": cards,
        "several": len({row.result.session.name for row in latest}) > 1,
        "judged": any(card.rows for card in cards if card.code),
        "fastest": f"{fastest[0].upper()}{fastest[1:]}." if fastest else "",
        "synthetic": [session.synthetic for session in report.sessions if session.synthetic],
        "stamped": [session for session in report.sessions if session.stamp and session is not last],
        "sections": SECTIONS,
        "terms": TERMS,
        "rows_at_once": ROWS_AT_ONCE,
        "parts": {
            "Stages": ("Wall time per image by stage", *tables.stage_table(results)),
            "Kernels": (
                "One traced round by kernel class",
                classes,
                [(result, cells) for result, cells in traces if result.trace],
            ),
        },
        "machines": [(_machine_title(sessions), _machine_facts(sessions[0])) for sessions in machines],
        "commit_url": lambda commits: commit_url(report.repository, commits),
        "anchor": lambda name: file_name(name.lower()),
    }


def commit_url(repository: str | None, commits: str) -> str:
    """The address of a commit, or of the comparison of `A..B`, on the site of a repository; empty if it has none."""
    ends = commits.split("..")
    if repository is None or not all(re.fullmatch(r"[0-9a-f]{7,40}", end) for end in ends):
        return ""
    return f"{repository}/compare/{ends[0]}...{ends[1]}" if len(ends) == 2 else f"{repository}/commit/{commits}"


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
        if value is not None:
            plain = f"{value:.10g}" if isinstance(value, float) else str(value)
            rows.append((name, size(value) if key == "memory_bytes" else plain))
    rows += [(f"measured {dtype}", f"{rate / 1e12:.3g} TFLOP/s") for dtype, rate in session.ceilings.items()]
    if session.copy_bytes_per_second:
        rows.append(("measured copy, read and written", f"{session.copy_bytes_per_second / 1e9:.4g} GB/s"))
    absent = [name for key, name in FACTS.items() if session.facts.get(key) is None]
    return rows + ([("unknown", ", ".join(absent))] if absent else [])


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
        packed = _packed(session.document)
        if len(packed) + 500 <= room:
            room -= len(packed) + 500
            inside.append({"name": f"{name}.json", "gzip": packed})
        else:
            room -= 500
            beside[f"{name}.json"] = json.dumps(session.document, indent=1)
    return inside, beside
