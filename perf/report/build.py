"""A report's files from saved runs: plots, tables, the page and the summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from perf.report import article, breakdown, growth, history, pictures, roofline, summary, tables
from perf.report.charts import Chart
from perf.report.palette import Palette
from perf.report.results import Result, Session, newest, read_session
from perf.runs.saved_run import BaselineError
from perf.runs.storage import write_atomically


@dataclass(frozen=True)
class Report:
    """What all parts of a report show. refused: a line for each file that could not be read."""

    sessions: tuple[Session, ...]
    results: tuple[Result, ...]  # of all sessions
    current: tuple[Result, ...]  # the last of each configuration, machine and stack
    charts: tuple[Chart, ...]
    article: tuple[tables.Table, ...]
    palette: Palette
    pictures: pictures.Pictures
    refused: tuple[str, ...]


def gather(
    paths: Sequence[Path],
    reference: str | None = None,
    pictures_folder: Path | None = None,
    say: Callable = lambda words: None,
) -> Report:
    """Read saved runs and make everything that is drawn. Raises tables.UnknownReference."""
    sessions, results, refused = [], [], []
    for number, path in enumerate(paths, 1):
        try:
            session, found = read_session(path)
        except BaselineError as error:
            refused.append(str(error))
            continue
        sessions.append(session)
        results += found
        if number % 20 == 0:
            say(f"report: read {number} of {len(paths)} saved runs")
    current = newest(results)
    return Report(
        sessions=tuple(sessions),
        results=tuple(results),
        current=tuple(current),
        charts=tuple(all_charts(results, current)),
        article=tuple(tables.article_tables(current, reference)),
        palette=Palette([one.technique for one in results] + list(tables.published_techniques())),
        pictures=pictures.find(current, pictures_folder),
        refused=tuple(refused),
    )


def all_charts(results: Sequence[Result], current: Sequence[Result]) -> list[Chart]:
    """Every chart that there is something for, in the order of charts.SECTIONS. Raises ValueError for two of one name."""
    made = [
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
    return _with_names_of_their_own(made)


def _with_names_of_their_own(charts: Sequence[Chart]) -> list[Chart]:
    """Two machines may be called alike: then a number tells their files apart."""
    seen: dict[str, int] = {}
    named = []
    for chart in charts:
        key = chart.name.lower()  # for file systems that do not tell case apart
        seen[key] = seen.get(key, 0) + 1
        named.append(chart if seen[key] == 1 else replace(chart, name=f"{chart.name}_{seen[key]}"))
    return named


def write(report: Report, folder: Path, say: Callable = lambda words: None) -> list[Path]:
    """Write all files of a report; returns their paths, the page first. Raises BaselineError where it cannot be written."""
    from perf.report import page, plots

    plots_folder = folder / "plots"
    try:
        plots_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BaselineError(f"{folder}: cannot be made: {error.strerror}; name another folder") from None
    written = page.write(report, folder)
    texts = {
        "summary.md": summary.markdown_of(report),
        "article.md": tables.article_markdown(report.article),
        "article.csv": tables.article_csv(report.article),
        "results.csv": tables.results_csv(report.current),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
        written.append(folder / name)
    for number, chart in enumerate(report.charts, 1):
        written += plots.draw(chart, report.palette, plots_folder)
        if number % 25 == 0:
            say(f"report: {number} of {len(report.charts)} plots drawn")
    return written
