"""Read saved runs and write the files of a report: plots, tables, page and summary."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from perf.report import article, breakdown, growth, history, images, roofline, summary, tables
from perf.report.charts import Chart
from perf.report.palette import Palette
from perf.report.results import Result, SavedSession, newest, read_session
from perf.runs.saved_run import BaselineError
from perf.runs.storage import write_atomically

PACKAGES = ("jinja2", "matplotlib")  # of the extra `report`


def missing_packages() -> list[str]:
    """Packages of the extra `report` that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


@dataclass(frozen=True)
class Report:
    """The contents of a report. refused: a line for each unreadable file."""

    sessions: tuple[SavedSession, ...]
    results: tuple[Result, ...]  # of all sessions
    current: tuple[Result, ...]  # the last of each configuration, machine and software stack
    charts: tuple[Chart, ...]
    article: tuple[tables.Table, ...]
    palette: Palette
    images: images.Images
    refused: tuple[str, ...]


def gather(
    paths: Sequence[Path],
    reference: str | None = None,
    images_folder: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Read saved runs and make all charts and tables. Raises tables.UnknownReference."""
    sessions, results, refused = [], [], []
    for number, path in enumerate(paths, 1):
        try:
            session, of_session = read_session(path)
        except BaselineError as error:
            refused.append(str(error))
            continue
        sessions.append(session)
        results += of_session
        if number % 20 == 0:
            say(f"report: read {number} of {len(paths)} saved runs")
    current = newest(results)
    return Report(
        sessions=tuple(sessions),
        results=tuple(results),
        current=tuple(current),
        charts=tuple(all_charts(results, current)),
        article=tuple(tables.article_tables(current, reference)),
        palette=Palette([result.technique for result in results] + list(tables.published_techniques())),
        images=images.find(current, images_folder),
        refused=tuple(refused),
    )


def all_charts(results: Sequence[Result], current: Sequence[Result]) -> list[Chart]:
    """All charts with data, in the order of charts.SECTIONS; charts of one name are numbered."""
    charts = [
        *article.launch_charts(current),
        *article.gpu_charts(current),
        *breakdown.ladder_charts(current),
        *breakdown.stage_charts(current),
        *growth.growth_charts(current),
        *roofline.roofline_charts(current),
        *breakdown.compile_charts(current),
        *breakdown.energy_charts(current),
        *breakdown.kernel_charts(current),
        *history.comparison_charts(results),
        *history.history_charts(results),
    ]
    counts: dict[str, int] = {}
    for at, chart in enumerate(charts):
        key = chart.name.lower()  # some file systems ignore case
        counts[key] = counts.get(key, 0) + 1
        if counts[key] > 1:
            charts[at] = replace(chart, name=f"{chart.name}_{counts[key]}")
    return charts


def write(report: Report, folder: Path, say: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Write all files of a report; returns their paths, the page first. Raises BaselineError."""
    from perf.report import page, plots

    plots_folder = folder / "plots"
    try:
        plots_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BaselineError(f"{folder}: cannot be made: {error.strerror}; name another folder") from None
    drawn = []
    for number, chart in enumerate(report.charts, 1):
        drawn.append(plots.draw(chart, report.palette, plots_folder))
        if number % 25 == 0:
            say(f"report: {number} of {len(report.charts)} plots drawn")
    written = page.write(report, drawn, folder)
    texts = {
        "summary.md": summary.markdown_of(report),
        "article.md": tables.article_markdown(report.article),
        "article.csv": tables.article_csv(report.article),
        "results.csv": tables.results_csv(report.current),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [*written, *(folder / name for name in texts), *(path for plot in drawn for path in plot.paths)]
