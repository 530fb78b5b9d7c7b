"""Read saved runs and write the files of a report: plots, tables, page and summary."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from perf.report import article, breakdown, growth, history, images, roofline, summary, tables
from perf.report.charts import Chart, groups
from perf.report.palette import Palette
from perf.report.results import Result, SavedSession, newest, read_session
from perf.report.text import counted
from perf.runs.history import ChangePoint
from perf.runs.saved_run import BaselineError
from perf.runs.storage import write_atomically

MOST_CHARTS = 30  # of a section: a fleet of hundreds of machines has thousands
PACKAGES = ("jinja2", "matplotlib")  # of the extra `report`


def missing_packages() -> list[str]:
    """Packages of the extra `report` that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def workflow_repository(environment: Mapping[str, str]) -> str | None:
    """The site of the repository of the GitHub workflow that runs this, or None."""
    server, repository = environment.get("GITHUB_SERVER_URL", ""), environment.get("GITHUB_REPOSITORY")
    return f"{server}/{repository}" if server.startswith("https://") and repository else None


@dataclass(frozen=True)
class Report:
    """The contents of a report. refused: a line for each unreadable file."""

    sessions: tuple[SavedSession, ...]
    results: tuple[Result, ...]  # of all sessions
    current: tuple[Result, ...]  # the last of each configuration, machine and software stack
    charts: tuple[Chart, ...]
    left_out: Mapping[str, int]  # charts of a section that has more than MOST_CHARTS
    article: tuple[tables.Table, ...]
    ratios: tuple[tables.RatioTable, ...]
    palette: Palette
    images: images.Images
    refused: tuple[str, ...]
    changes: tuple[ChangePoint, ...] = ()  # of the stored sessions
    repository: str | None = None  # the site of the commits, such as https://github.com/OWNER/NAME

    @property
    def gists(self) -> dict[str, str]:
        """One line for the heading of each section of charts."""
        counts = Counter(chart.section for chart in self.charts)
        lines = {name: counted(count, "chart") for name, count in counts.items()}
        for name, count in self.left_out.items():
            lines[name] += (
                f" of {counts[name] + count}, those of the newest sessions: report on fewer files for the others"
            )
        lines.setdefault("GPUs", "the published tables")
        paying = [breakdown.break_even(result) for result in self.current if result.amortise is not None]
        if paying:
            lines["Compiling"] = f"{lines.get('Compiling', '')}: {paying[0]}"
        if "History" in lines:
            points = len(self.changes)
            lines["History"] += f", {counted(points, 'change point')}"
        return lines


def gather(
    paths: Sequence[Path],
    reference: str | None = None,
    images_folder: Path | None = None,
    repository: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Read saved runs and make all charts and tables. repository: as in Report. Raises tables.UnknownReference."""
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
    changes = history.change_points(results)
    charts, left_out = _newest_of_each_section(all_charts(results, current, changes))
    return Report(
        sessions=tuple(sessions),
        results=tuple(results),
        current=tuple(current),
        charts=tuple(charts),
        left_out=left_out,
        article=tuple(tables.article_tables(current, reference)),
        ratios=tuple(tables.ratio_tables(current)),
        palette=Palette([result.technique for result in results] + list(tables.published_techniques())),
        images=images.find(current, images_folder),
        refused=tuple(refused),
        changes=tuple(changes),
        repository=repository,
    )


def all_charts(results: Sequence[Result], current: Sequence[Result], points: Sequence[ChangePoint]) -> list[Chart]:
    """All charts with data, in the order of charts.SECTIONS; charts of one name are numbered."""
    charts = [
        *article.launch_charts(current),
        *article.gpu_charts(current),
        *article.ratio_charts(current),
        *breakdown.ladder_charts(current),
        *breakdown.stage_charts(current),
        *growth.growth_charts(current),
        *roofline.roofline_charts(current),
        *breakdown.compile_charts(current),
        *breakdown.energy_charts(current),
        *breakdown.kernel_charts(current),
        *history.comparison_charts(results),
        *history.history_charts(results, points),
    ]
    counts: dict[str, int] = {}
    for at, chart in enumerate(charts):
        key = chart.name.lower()  # some file systems ignore case
        counts[key] = counts.get(key, 0) + 1
        if counts[key] > 1:
            charts[at] = replace(chart, name=f"{chart.name}_{counts[key]}")
    return charts


def _newest_of_each_section(charts: Sequence[Chart]) -> tuple[list[Chart], dict[str, int]]:
    """The last MOST_CHARTS charts of each section, since results are in order of their sessions, and how many are left out."""
    sections = groups(charts, lambda chart: chart.section)
    left_out = {name: len(members) - MOST_CHARTS for name, members in sections.items() if len(members) > MOST_CHARTS}
    return [chart for members in sections.values() for chart in members[-MOST_CHARTS:]], left_out


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
        "article.md": tables.article_markdown([*report.ratios, *report.article]),
        "article.csv": tables.article_csv(report.article),
        "results.csv": tables.results_csv(report.current),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [*written, *(folder / name for name in texts), *(path for plot in drawn for path in plot.paths)]
