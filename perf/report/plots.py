"""Draw charts with matplotlib, as PNG and SVG files; the page shows the same SVG."""

from __future__ import annotations

import itertools
from pathlib import Path

from matplotlib import rc_context
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.lines import Line2D

from perf.report.bars import draw_bars
from perf.report.canvas import STYLE, Canvas, Plot, labelled, plain_numbers
from perf.report.charts import Chart, Series
from perf.report.palette import Palette


def draw(chart: Chart, palette: Palette, folder: Path) -> Plot:
    """Write NAME.png and NAME.svg of a chart."""
    with rc_context({**STYLE, "svg.hashsalt": chart.name}):  # ids that repeat from run to run and differ between charts
        canvas, height = (
            draw_bars(chart, palette)
            if chart.scale == "category"
            else (_draw_lines(chart, palette), 1.9 if chart.filled else 2.9)
        )
        return canvas.save(folder, height)


def _draw_lines(chart: Chart, palette: Palette) -> Canvas:
    canvas = Canvas(chart)
    for series in chart.series:
        _draw_series(canvas, series, palette)
    axes = canvas.axes
    for number, (x, text) in enumerate(chart.marks):
        axes.axvline(_x(chart, x), color="#7a7a7a", linewidth=0.9, linestyle=":")
        if number in labelled(chart):
            where = {"xycoords": ("data", "axes fraction"), "va": "top", "ha": "right", "fontweight": "bold"}
            axes.annotate(f"{text} ", (_x(chart, x), 0.99), **where, fontsize=8)
    if chart.scale == "log":
        axes.set_xscale("log")
        plain_numbers(axes.xaxis)
    elif chart.scale == "time":
        axes.xaxis_date()
        locator = AutoDateLocator(minticks=3, maxticks=7)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    elif chart.x_label.startswith(("launch", "batch")):
        axes.xaxis.get_major_locator().set_params(integer=True)
    if chart.scale == "linear" and chart.x_label != "launch":
        axes.set_xlim(left=0)
    return canvas


def _draw_series(canvas: Canvas, series: Series, palette: Palette) -> None:
    chart, look, curve = canvas.chart, palette[series.look], series.form == "curve"
    facets = [point.facets for point in series.points]
    line = {"color": look.colour, "linestyle": look.dash, "linewidth": 1.0 if curve else 1.4}
    markers = {"color": look.colour, "marker": look.marker, "markersize": 4.5, "linestyle": "none"}
    if series.form == "markers":
        line["linestyle"] = "none"
    else:
        # One piece per run of points with the same facets, and one between two runs, so that filters hide them apart.
        runs = [list(run) for _, run in itertools.groupby(series.points, key=lambda point: point.facets)]
        for piece in [*runs, *([before[-1], after[0]] for before, after in itertools.pairwise(runs))]:
            xs, ys = [_x(chart, point.x) for point in piece], [point.y for point in piece]
            canvas.plot(xs, ys, [point.facets for point in piece], series.name, **line)
    if series.band:
        canvas.mark(canvas.axes.axhspan(*series.band, color=look.colour, alpha=0.15, linewidth=0), facets)
    if chart.filled:
        known = [point for point in series.points if point.low is not None and point.high is not None]
        bounds = ([_x(chart, p.x) for p in known], [p.low for p in known], [p.high for p in known])
        canvas.mark(canvas.axes.fill_between(*bounds, color=look.colour, alpha=0.18, linewidth=0), facets)
    for point in () if curve else series.points:
        x = _x(chart, point.x)
        if not chart.filled:
            canvas.whisker(x, point.y, point, look.colour)
        canvas.plot([x], [point.y], [point.facets], canvas.tooltip(series.name, point), **markers)
        canvas.ring(x, point.y, point)
    if len(chart.series) > 1 or chart.filled:
        canvas.legend(series.name, Line2D([], [], **{**({} if curve else markers), **line}), facets)


def _x(chart: Chart, x: float) -> float:
    return x / 86_400 if chart.scale == "time" else x  # matplotlib counts time in days since 1970
