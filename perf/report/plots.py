"""Charts as PNG and SVG by matplotlib. Nothing here computes: perf.report.charts says what is drawn."""

from __future__ import annotations

import math
import textwrap
from datetime import datetime, timezone
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from perf.analysis.verdicts import Verdict
from perf.report import bars
from perf.report.charts import Chart, Series
from perf.report.palette import Palette

DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
WIDTH = 7.2  # inches: a phone shows a wider picture too small to be read
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "sd-perf",  # the same run draws the same file
    "text.parse_math": False,  # a name with a dollar is a name
}


def draw(chart: Chart, palette: Palette, folder: Path) -> list[Path]:
    """Write NAME.png and NAME.svg; returns their paths."""
    with rc_context(STYLE):
        figure = _figure(chart, palette)
        paths = [folder / f"{chart.name}.{kind}" for kind in ("png", "svg")]
        FigureCanvasAgg(figure)
        figure.savefig(paths[0], dpi=130, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None, "Creator": None, "Title": chart.title})
    return paths


def _figure(chart: Chart, palette: Palette) -> Figure:
    is_bars = chart.scale == "category"
    labels = bars.labels_of(chart) if is_bars else []
    lie = is_bars and bars.lies(labels)
    beside, more_lines = bars.size_of_labels(labels)
    named = _legend_names(chart)
    longest = max(map(len, named), default=0)
    columns = 1 if longest > 46 else 2 if longest > 24 else 3
    legend_height = 0.22 * math.ceil(len(named) / columns) + 0.1 if len(named) > 1 else 0.0
    below = 0.85 if chart.scale == "time" else 0.55 + (0.0 if lie else more_lines)
    left = beside + 0.35 if lie else 0.85
    title = textwrap.fill(chart.title, int((WIDTH - (0.1 if lie else left)) * 13)) or chart.title
    above = 0.2 + 0.19 * len(title.splitlines())
    tall = max(1.2, sum(bars.rooms_of(chart, labels))) if lie else 3.4
    height = tall + below + legend_height + above
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes(
        (left / WIDTH, (below + legend_height) / height, 1 - (left + 0.25) / WIDTH, tall / height)  # in inches
    )
    axes.set_title(title, fontsize=10, x=(0.1 - left) / (WIDTH - left - 0.25) if lie else 0.0, ha="left")
    axes.set_xlabel(chart.y_label if lie else chart.x_label)
    axes.set_ylabel("" if lie else chart.y_label)  # what the labels beside lying bars are, they say themselves
    if is_bars:
        bars.draw_bars(axes, chart, palette, labels)
    else:
        _lines(axes, chart, palette)
    _levels(axes, chart, lie)
    if chart.y_log:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    elif chart.zero:
        axes.set_xlim(left=0) if lie else axes.set_ylim(bottom=0)
    handles, names = axes.get_legend_handles_labels()
    if len(named) > 1:
        at = {"loc": "lower left", "bbox_to_anchor": (0.1 / WIDTH, 0.0)}
        figure.legend(handles, names, **at, ncols=columns, frameon=False, fontsize=8)
    return figure


def _levels(axes, chart: Chart, lie: bool) -> None:
    for name, level in chart.levels:
        line, place = (axes.axvline, (level, 0.995)) if lie else (axes.axhline, (0.995, level))
        line(level, color="#444444", linewidth=1, linestyle="--")
        how = {"xycoords": ("data", "axes fraction"), "rotation": 90, "va": "top"} if lie else {"va": "bottom"}
        axes.annotate(name, place, **{"xycoords": ("axes fraction", "data"), **how}, ha="right", fontsize=8)


def _legend_names(chart: Chart) -> list[str]:
    if chart.scale == "category" and not chart.stacked and all(_own_place(series) for series in chart.series):
        return []
    names = [series.name for series in chart.series if not bars.hidden(chart, series)]
    names += ["paler"] if chart.scale == "category" and any(series.faint for series in chart.series) else []
    return names + list({point.verdict for series in chart.series for point in series.points} - {None})


def _own_place(series: Series) -> bool:
    """A bar that stands over its own name needs no legend."""
    return len(series.points) == 1 and series.points[0].x == series.name


def _lines(axes, chart: Chart, palette: Palette) -> None:
    for series in chart.series:
        look = palette[series.look]
        xs = [_place(chart, point.x) for point in series.points]
        ys = [point.y for point in series.points]
        curve = series.form == "curve"
        if series.band:
            axes.axhspan(*series.band, color=look.colour, alpha=0.15, linewidth=0)
        known = [point for point in series.points if point.low is not None and point.high is not None]
        if known and not curve:
            axes.errorbar(
                [_place(chart, point.x) for point in known],
                [point.y for point in known],
                yerr=[
                    [max(0.0, point.y - point.low) for point in known],
                    [max(0.0, point.high - point.y) for point in known],
                ],
                fmt="none",
                ecolor=look.colour,
                elinewidth=1,
                capsize=2,
            )
        axes.plot(
            xs,
            ys,
            color=look.colour,
            linestyle="none" if series.form == "markers" else DASHES[look.dash],
            linewidth=1.0 if curve else 1.4,
            marker=None if curve else bars.MARKERS[look.marker],
            markersize=4.5,
            label=bars.shown(series.name),
        )
    _verdicts(axes, chart)
    for number, (place, words) in enumerate(chart.marks):
        at = _place(chart, place)
        axes.axvline(at, color="#666666", linewidth=0.9, linestyle=":")
        if number not in chart.labelled_marks:
            continue
        axes.annotate(
            f" {words[:60]}",
            (at, 0.99),
            xycoords=("data", "axes fraction"),
            rotation=90,
            va="top",
            ha="left",
            fontsize=6.5,
        )
    if chart.scale == "log":
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
    elif chart.scale == "linear" and chart.x_label.startswith(("launch", "batch")):
        axes.xaxis.get_major_locator().set_params(integer=True)
    elif chart.scale == "time":
        axes.tick_params(axis="x", labelrotation=20)
    if chart.scale == "linear" and chart.x_label != "launch":
        axes.set_xlim(left=0)


def _plain_numbers(axis) -> None:
    """Matplotlib writes powers as TeX, which STYLE turns off. The fewer the further the axis reaches."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if 0 < low < high else 1.0
    named = "123456789" if decades < 0.8 else "125" if decades < 2.5 else "1"
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in named else ""))
    axis.set_tick_params(which="minor", labelsize=7)


def _verdicts(axes, chart: Chart) -> None:
    """Rings around the points that were judged, each verdict with its own shape."""
    for verdict in Verdict:
        points = [point for series in chart.series for point in series.points if point.verdict == verdict.value]
        if points:
            axes.plot([_place(chart, point.x) for point in points], [point.y for point in points], **bars.ring(verdict))


def _place(chart: Chart, x):
    return datetime.fromtimestamp(x, timezone.utc) if chart.scale == "time" else x
