"""The document inside index.html: headline, filters, charts' places, tables, pictures, facts and commands. All is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape

from perf.report import summary, tables
from perf.report.charts import SECTIONS
from perf.report.palette import KERNEL_CLASSES
from perf.report.reproduce import command
from perf.report.results import Result, Session, ranked
from perf.report.text import file_name, seconds

FACTS = (
    ("name", "device"),
    ("uuid", "UUID"),
    ("driver", "driver"),
    ("torch", "torch"),
    ("cuda", "CUDA"),
    ("cudnn", "cuDNN"),
    ("triton", "triton"),
    ("xformers", "xFormers"),
    ("python", "Python"),
    ("memory_bytes", "memory, bytes"),
    ("power_limit_watts", "power limit, W"),
    ("sm_clock_max_mhz", "largest SM clock, MHz"),
    ("memory_clock_max_mhz", "largest memory clock, MHz"),
    ("clock", "clock"),
    ("threads", "threads of torch"),
    ("isolated", "each launch a fresh process"),
)


def raw_name(session: Session) -> str:
    """The name under which a saved run is downloaded."""
    return file_name(session.saved.path.stem) + ".json"


def body(report, index) -> str:
    """Everything between header and raw data. index: numbers of facets (page.FacetIndex)."""
    parts = [_header(report), "<main>", _filters(), _results(report, index)]
    for name, words in SECTIONS.items():
        parts.append(_charts(report, name, words))
        if name == "GPUs":
            parts.append(_article(report))
        if name == "Stages":
            rows = tables.stage_rows(ranked(report.current))
            parts.append(_parts_table("seconds per image", tables.STAGE_NAMES, rows, "Time by stage", index))
        if name == "Kernels":
            rows = [(one, _traced(one)) for one in ranked(report.current) if one.trace]
            parts.append(
                _parts_table("one traced round", tuple(KERNEL_CLASSES), rows, "Time by class of kernel", index)
            )
    parts += [_pictures(report, index), _commands(report, index), _machines(report)]
    return "\n".join(parts)


def _header(report) -> str:
    parts = [
        '<header><div class="top"><h1>Stable Diffusion performance</h1><button id="theme" type="button"></button></div>'
    ]
    if report.sessions:
        last = max(report.sessions, key=lambda one: (one.started, one.name))
        line = summary.fastest([one for one in report.results if one.session is last])
        parts.append(f'<p class="headline">{escape(last.name)}: {escape(summary.headline(last, report.results))}</p>')
        parts.append(f"<p>{escape(line[0].upper() + line[1:])}.</p>" if line else "")
    made_up = {one.synthetic for one in report.sessions if one.synthetic}
    names = [one.name for one in report.sessions if one.synthetic]
    for words in sorted(made_up):
        parts.append(
            f'<p class="synthetic"><strong>Synthetic data</strong> in {len(names)} of {len(report.sessions)} '
            f"saved runs: {escape(words)}.</p>"
        )
    for line in report.refused:
        parts.append(f'<p class="note">Not read: {escape(line)}</p>')
    links = [f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in ("Results", *_with_charts(report))]
    links += [f'<a href="#{_anchor(name)}">{name}</a>' for name in ("Pictures", "Commands", "Machines", "Raw data")]
    parts.append(f'<nav aria-label="Sections">{"".join(links)}</nav></header>')
    return "\n".join(parts)


def _with_charts(report) -> list[str]:
    there = {chart.section for chart in report.charts}
    return [name for name in SECTIONS if name in there]


def _anchor(name: str) -> str:
    return file_name(name.lower())


def _filters() -> str:
    return (
        '<div id="filters" role="region" aria-label="Filters"><details open><summary>Filters: charts and tables show what is '
        'ticked</summary><div class="sets"></div><p><button id="all" type="button">Tick all</button></p></details></div>'
    )


def _table(header: Sequence[str], rows: Sequence[str], name: str) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _results(report, index) -> str:
    rows = []
    for one, cells in zip(ranked(report.current), tables.result_rows(report.current)):
        colour = report.palette[one.technique].colour
        drawn = [f'<td><span class="swatch" style="background:{colour}"></span>{escape(cells[0])}</td>']
        for name, cell in zip(tables.COLUMNS[1:], cells[1:]):
            kind = (
                ' class="wide"'
                if name == "verdict"
                else ""
                if name in ("machine", "torch", "session")
                else ' class="number"'
            )
            drawn.append(f"<td{kind}>{escape(cell)}</td>")
        rows.append(f'<tr data-facets="{index(one.facets)}">{"".join(drawn)}</tr>')
    return (
        f'<section id="results"><h2>Results</h2><p class="note">The last session of each configuration, machine and stack, '
        f"the fastest image first. Medians over launches.</p>{_table(tables.COLUMNS, rows, 'Results')}</section>"
    )


def _charts(report, section: str, words: str) -> str:
    figures = []
    for place, chart in enumerate(report.charts):
        if chart.section == section:
            title, said = escape(chart.title), escape(f"{chart.title}. {chart.summary}")
            figures.append(
                f'<figure id="chart-{place}" data-chart="{place}"><figcaption>{title}</figcaption>'
                f'<div class="plot" role="img" aria-label="{said}"></div></figure>'
            )
    if not figures:
        return ""
    return (
        f'<section id="{_anchor(section)}" data-charts><h2>{escape(section)}</h2><p class="note">{escape(words)}</p>'
        f'<p class="nothing" hidden>Nothing here matches the filters.</p><div class="charts">{"".join(figures)}</div></section>'
    )


def _article(report) -> str:
    parts = ['<section id="article"><h2>The published tables, and yours</h2>']
    for table in report.article:
        header = ["configuration"] + [name + (" (published)" if printed else "") for name, printed in table.columns]
        rows = []
        for name, cells in zip(table.rows, table.cells):
            drawn = "".join(f'<td class="number">{escape(tables.cell_words(cell))}</td>' for cell in cells)
            rows.append(f'<tr><th scope="row">{escape(name)}</th>{drawn}</tr>')
        parts.append(f"<h3>{escape(table.title)}</h3>{_table(header, rows, table.title)}")
        parts.append(
            f'<p class="note">In brackets: improvement over {escape(table.reference)} in the same column; positive is faster. '
            f"Published: {escape(tables.SOURCE[table.model])}, averages of 10 launches without intervals.</p>"
        )
    return "".join([*parts, "</section>"])


def _traced(one: Result) -> list[str]:
    return [seconds(one.trace[name]) if name in one.trace else "" for name in KERNEL_CLASSES]


def _parts_table(what: str, columns: Sequence[str], found: Sequence[tuple[Result, list[str]]], name: str, index) -> str:
    """A row for each result with the time of each of its parts."""
    rows = []
    for one, cells in found:
        drawn = "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
        words = f"{one.id}, {one.session.machine}, torch {one.torch}"
        rows.append(f'<tr data-facets="{index(one.facets)}"><th scope="row">{escape(words)}</th>{drawn}</tr>')
    return _table([what, *columns], rows, name) if rows else ""


def _pictures(report, index) -> str:
    parts = ['<section id="pictures"><h2>Pictures</h2>']
    if report.pictures.found:
        parts.append('<p class="note">Beside each the difference from its reference, amplified 8 times.</p>')
        parts.append('<div class="pictures">')
    for one in report.pictures.found:
        quality = "" if one.result.psnr_db is None else f", {one.result.psnr_db:.1f} dB"
        words = f"{one.result.id}{quality}"
        parts.append(f'<figure data-facets="{index(one.result.facets)}"><img src="{one.image}" alt="{escape(words)}">')
        if one.difference:
            parts.append(f'<img src="{one.difference}" alt="{escape(one.result.id)}: difference from its reference">')
        parts.append(f"<figcaption>{escape(words)}</figcaption></figure>")
    parts += ["</div>"] if report.pictures.found else []
    if report.pictures.missing:
        parts.append(f'<p class="note">{escape(report.pictures.missing)}.</p>')
    return "".join([*parts, "</section>"])


def _commands(report, index) -> str:
    items = []
    for one in ranked(report.current):
        known = f"{one.id}, {one.session.machine}, torch {one.torch}"
        items.append(
            f'<div data-facets="{index(one.facets)}"><h3>{escape(known)}</h3><pre>{escape(command(one))}</pre></div>'
        )
    return (
        '<section id="commands"><h2>Commands</h2><p class="note">What measures each number again on such a machine. '
        "PATH stands for the Python that a label named.</p>"
        f"<details><summary>{len(items)} commands</summary>{''.join(items)}</details></section>"
    )


def _machines(report) -> str:
    parts = ['<section id="machines"><h2>Machines</h2>']
    seen: dict[tuple, list[Session]] = {}
    for one in report.sessions:
        seen.setdefault(one.identity, []).append(one)
    for ones in seen.values():
        rows = "".join(
            f'<tr><th scope="row">{escape(words)}</th><td>{escape(_fact(ones[0].facts.get(key)))}</td></tr>'
            for key, words in FACTS
        )
        for name, rate in ones[0].ceilings.items():
            rows += f'<tr><th scope="row">measured {escape(name)}</th><td>{rate / 1e12:.3g} TFLOP/s</td></tr>'
        if ones[0].copy_bytes_per_second:
            rate = ones[0].copy_bytes_per_second / 1e9
            rows += f'<tr><th scope="row">measured copy, read and written</th><td>{rate:.4g} GB/s</td></tr>'
        parts.append(f"<h3>{escape(ones[0].machine)}: {_listed(ones)}</h3>")
        parts.append(f'<div class="scroll" tabindex="0" role="region" aria-label="Machine"><table>{rows}</table></div>')
    return "".join([*parts, "</section>"])


def _listed(ones: Sequence[Session]) -> str:
    if len(ones) == 1:
        return f"session {escape(ones[0].name)}, {_when(ones[0])}"
    return f"{len(ones)} sessions"


def _fact(value: object) -> str:
    if value is None:
        return "unknown"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _when(session: Session) -> str:
    if not session.started:
        return "unknown time"
    return f"{datetime.fromtimestamp(session.started, timezone.utc):%Y-%m-%d %H:%M} UTC"


def downloads(report, inside: Sequence[str], beside) -> str:
    """Buttons for the raw JSON in the page, links to what it had no room for, and the end of the document."""
    buttons = [f'<button type="button" data-raw="{n}">{escape(name)}</button>' for n, name in enumerate(inside)]
    links = [f'<a href="runs/{escape(name)}" download>{escape(name)}</a>' for name in beside]
    more = f"<p>Too large for the page, in <code>runs/</code> beside it: {', '.join(links)}</p>" if links else ""
    return (
        f'<section id="raw-data"><h2>Raw data</h2><p class="note">The saved runs as they were read, for any tool that '
        f"reads pytest-benchmark.</p><p>{' '.join(buttons)}</p>{more}</section></main>"
        "<footer>Made by python -m perf report; this page asks the network for nothing.</footer>"
    )
