"""A matplotlib figure whose marks carry what the page needs: the facets to filter by and the text of a tooltip."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from perf.analysis.verdicts import Verdict
from perf.report.charts import Chart, Point
from perf.report.palette import VERDICTS
from perf.report.results import Facets

WIDTH = 5.4  # inches: a phone and a column of the page show a figure of this width at about its own size
INK, RULE, PAPER = "#1c1c1c", "#d9d9d9", "#ffffff"  # the light theme; page.py replaces them by the page's variables
STYLE = {
    "font.size": 10,
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.color": RULE,
    "hatch.linewidth": 0.5,
    "svg.fonttype": "none",  # real text, which browsers can theme, search and select
    "text.parse_math": False,  # a dollar in a name is not TeX
}


@dataclass(frozen=True)
class Mark:
    """A group of the SVG. facets: of its results; title: its tooltip; legend: shown while any of its results is shown."""

    facets: tuple[Facets, ...]
    title: str = ""
    legend: bool = False


@dataclass(frozen=True)
class Plot:
    """A drawn chart: the files written, the text of the SVG, its marks by the id of their group.

    title_height: of the title at the top in points, the unit of the SVG; the page has a caption instead.
    """

    chart: Chart
    paths: tuple[Path, ...]
    svg: str
    marks: dict[str, Mark]
    title_height: float


class Canvas:
    """Axes of one chart. Values run along y, or along x where bars are lying."""

    def __init__(self, chart: Chart, lying: bool = False):
        self.chart, self.lying = chart, lying
        self.figure = Figure(layout="constrained")
        self.axes = self.figure.add_subplot()
        self._marks: dict[str, Mark] = {}
        self._legend: dict[str, tuple[Artist, list[Facets | None]]] = {}

    def mark(self, artist: Artist, facets: Iterable[Facets | None], title: str = "", legend: bool = False) -> None:
        """Register an artist for filters and tooltips."""
        artist.set_gid(f"mark-{len(self._marks)}")
        if not legend:
            artist.set_in_layout(False)  # inside the axes anyway, and slow to measure
        known = tuple(dict.fromkeys(filter(None, facets)))
        self._marks[artist.get_gid()] = Mark(known, title, legend)

    def plot(self, places, values, facets: Iterable[Facets | None], title: str = "", **style) -> None:
        """A line or markers over places of the category or x axis."""
        (line,) = self.axes.plot(*((values, places) if self.lying else (places, values)), **style)
        self.mark(line, facets, title)

    def whisker(self, place: float, end: float, point: Point, colour: str) -> None:
        """The interval of a point whose value is drawn at `end`."""
        if point.low is not None and point.high is not None:
            ends = [end - max(0.0, point.y - point.low), end + max(0.0, point.high - point.y)]
            style = {"marker": "|" if self.lying else "_", "markersize": 5, "color": colour, "linewidth": 1}
            self.plot([place, place], ends, [point.facets], **style)

    def ring(self, place: float, end: float, point: Point) -> None:
        """Mark the verdict of a point; each verdict has a shape of its own."""
        if point.verdict:
            colour, marker = VERDICTS[Verdict(point.verdict)]
            style = {"linestyle": "none", "marker": marker, "markersize": 9, "markerfacecolor": "none"}
            style |= {"markeredgecolor": colour, "markeredgewidth": 1.4}
            self.plot([place], [end], [point.facets], **style)
            self.legend(point.verdict, Line2D([], [], **style), [point.facets])

    def legend(self, name: str, handle: Artist, facets: Iterable[Facets | None]) -> None:
        """Add an entry to the legend, or facets to an existing one."""
        self._legend.setdefault(name, (handle, []))[1].extend(facets)

    def tooltip(self, name: str, point: Point) -> str:
        """Name, value with interval, unit and note of a point."""
        bounds = "" if point.low is None or point.high is None else f" [{point.low:.4g}, {point.high:.4g}]"
        return "\n".join(filter(None, (name, f"{point.y:.4g}{bounds} {self.chart.y_label}", point.note[:400])))

    def save(self, folder: Path, height: float) -> Plot:
        """Finish the axes and write NAME.png and NAME.svg. height: of the axes in inches."""
        chart, axes = self.chart, self.axes
        for name, level in chart.levels:
            line, place = (axes.axvline, (level, 0.995)) if self.lying else (axes.axhline, (0.995, level))
            line(level, color=INK, linewidth=1, linestyle="--")
            style = {"xycoords": ("axes fraction", "data"), "va": "bottom"}
            if self.lying:
                style = {"xycoords": ("data", "axes fraction"), "rotation": 90, "va": "top"}
            axes.annotate(name, place, **style, ha="right", fontsize=8)
        if chart.y_log:
            axes.set_yscale("log")
            plain_numbers(axes.yaxis)
        elif chart.zero:
            axes.set_xlim(left=0) if self.lying else axes.set_ylim(bottom=0)
        axes.set_xlabel(chart.y_label if self.lying else chart.x_label)
        axes.set_ylabel("" if self.lying else textwrap.fill(chart.y_label, 40))
        rows = self._draw_legend() if self._legend else 0
        title = textwrap.fill(chart.title, 66) or chart.title
        title_height = 14.0 * len(title.splitlines())
        self.figure.suptitle(title, x=0.01, ha="left", fontsize=10, gid="title")
        self.figure.set_size_inches(WIDTH, height + 0.6 + 0.18 * rows + title_height / 72)
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine(None)  # one layout for both files
        paths = tuple(folder / f"{chart.name}.{suffix}" for suffix in ("png", "svg"))
        self.figure.savefig(paths[0], dpi=170, metadata={"Software": None})
        svg = io.StringIO()
        self.figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Title": chart.title})
        paths[1].write_text(svg.getvalue(), encoding="utf-8")
        return Plot(chart, paths, svg.getvalue(), self._marks, title_height)

    def _draw_legend(self) -> int:
        """Draw the legend below the axes; returns its number of rows."""
        verdicts = {verdict.value for verdict in Verdict}
        entries = sorted(self._legend.items(), key=lambda entry: entry[0] in verdicts)
        # matplotlib leaves names that begin with _ out of a legend.
        names = [textwrap.fill(f" {name}" if name.startswith("_") else name, 68) for name, _ in entries]
        longest = max(len(line) for name in names for line in name.splitlines() or [""])
        columns = 1 if longest > 34 else 2 if longest > 20 else 3
        handles = [handle for _, (handle, _) in entries]
        where = {"loc": "outside lower left", "ncols": columns}
        legend = self.figure.legend(handles, names, **where, frameon=False, fontsize=8.5)
        for label, handle, (_, (_, facets)) in zip(legend.get_texts(), legend.legend_handles, entries):
            for artist in (label, handle):
                self.mark(artist, facets, legend=True)
        return math.ceil(len(names) / columns) + sum(name.count("\n") for name in names)


def plain_numbers(axis) -> None:
    """Label a logarithmic axis without TeX; the more decades it spans the fewer labels."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if 0 < low < high else 1.0
    digits = "123456789" if decades < 0.8 else "125" if decades < 2.5 else "1"
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in digits else ""))
    axis.set_tick_params(which="minor", labelsize=8)


def labelled(chart: Chart) -> list[int]:
    """Numbers of the vertical marks with room for their text; of close marks the first."""
    xs = [point.x for point in chart.points]
    room, last, numbers = 0.07 * (max(xs) - min(xs)) if xs else 0.0, None, []
    for number, (x, _) in enumerate(chart.marks):
        if last is None or x - last >= room:
            numbers.append(number)
            last = x
    return numbers
