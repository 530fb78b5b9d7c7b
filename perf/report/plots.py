"""Charts as PNG and SVG by matplotlib. Nothing here computes: perf.report.charts says what is drawn."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from perf.report.charts import Chart, Point, Series
from perf.report.palette import KERNEL_CLASSES, STAGES, VERDICTS, Look, Palette
from perf.verdicts import Verdict

DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v", "cross": "P"}
MARKERS |= {"x": "X", "star": "*"}
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
        figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths


def _figure(chart: Chart, palette: Palette) -> Figure:
    labels = _labels(chart)
    bars = chart.scale == "category"
    named = _legend_names(chart)
    columns = 1 if max(map(len, named), default=0) > 46 else 2 if max(map(len, named), default=0) > 24 else 3
    legend_height = 0.22 * math.ceil(len(named) / columns) + 0.1 if len(named) > 1 else 0.0
    tilted = bars and (len(labels) > 6 or max(map(len, labels), default=0) * len(labels) > 70)
    below = 0.036 * max(map(len, labels), default=0) + 0.6 if tilted else 0.85 if chart.scale == "time" else 0.55
    width = max(7.2, 0.5 * len(labels) + 1.5) if bars else 7.2
    width = max(width, 0.11 * sum(_bars_at(chart, labels)) + 1.5) if bars else width
    width = min(width, 16.0)
    title = _wrapped(chart.title, int(width * 13))
    above = 0.2 + 0.19 * len(title.splitlines())
    height = 3.4 + below + legend_height + above
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes(
        (0.85 / width, (below + legend_height) / height, 1 - 1.1 / width, 3.4 / height)  # in inches, so that all agree
    )
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    if bars:
        _bars(axes, chart, palette, labels, tilted)
    else:
        _lines(axes, chart, palette)
    for name, level in chart.levels:
        axes.axhline(level, color="#444444", linewidth=1, linestyle="--")
        axes.annotate(name, (0.995, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    if chart.y_log:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    elif chart.zero:
        axes.set_ylim(bottom=0)
    handles, names = axes.get_legend_handles_labels()
    if len(named) > 1:
        figure.legend(
            handles,
            names,
            loc="lower left",
            bbox_to_anchor=(0.6 / width, 0.0),
            ncols=columns,
            frameon=False,
            fontsize=8,
        )
    return figure


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width)) or text


def _legend_names(chart: Chart) -> list[str]:
    if chart.scale == "category" and not chart.stacked and all(_own_place(series) for series in chart.series):
        return []
    names = [series.name for series in chart.series if not _hidden(chart, series)]
    names += ["paler"] if chart.scale == "category" and any(series.faint for series in chart.series) else []
    return names + list({point.verdict for series in chart.series for point in series.points} - {None})


def _hidden(chart: Chart, series: Series) -> bool:
    """A published series has the look of the reader's own, and one entry for both is enough."""
    names = {one.name for one in chart.series}
    return series.faint and series.look in names


def _own_place(series: Series) -> bool:
    """A bar that stands over its own name needs no legend."""
    return len(series.points) == 1 and series.points[0].x == series.name


def _shown(name: str) -> str:
    """Matplotlib leaves names that begin with _ out of a legend."""
    return f" {name}" if name.startswith("_") else name


def _labels(chart: Chart) -> list[str]:
    if chart.places:
        return list(chart.places)
    return list(dict.fromkeys(str(point.x) for series in chart.series for point in series.points))


def _bars_at(chart: Chart, labels: Sequence[str]) -> list[int]:
    """How many bars stand beside each other at each label."""
    if chart.stacked:
        return [1] * len(labels)
    return [sum(str(point.x) == label for series in chart.series for point in series.points) for label in labels]


def _look(series: Series, palette: Palette) -> Look:
    if series.look in STAGES or series.look in KERNEL_CLASSES:
        return Look({**KERNEL_CLASSES, **STAGES}[series.look])
    return palette[series.look]


def _bars(axes, chart: Chart, palette: Palette, labels: Sequence[str], tilted: bool) -> None:
    counts = dict(zip(labels, _bars_at(chart, labels)))
    slots, done = max(counts.values(), default=1), dict.fromkeys(labels, 0)
    tops = dict.fromkeys(labels, 0.0)
    previous = None
    for series in chart.series:
        look, name = _look(series, palette), _shown(series.name)
        for point in series.points:
            label = str(point.x)
            place = labels.index(label)
            width = 0.8 if chart.stacked else 0.84 / slots
            if not chart.stacked:
                place += (done[label] - (counts[label] - 1) / 2) * 0.84 / slots
            done[label] += 1
            bottom = tops[label] if chart.stacked else point.base
            height = point.y if chart.stacked else point.y - point.base
            axes.bar(
                place,
                height,
                width * 0.92,
                bottom=bottom,
                color=look.colour,
                alpha=0.45 if series.faint else 1.0,
                hatch=(look.hatch * 3 or None) if not series.faint else None,
                edgecolor="white",
                linewidth=0.4,
                label=name if not _hidden(chart, series) else None,
            )
            name = None
            tops[label] += point.y
            end = tops[label] if chart.stacked else point.y
            _whisker(axes, place, end, point)
            if point.base and previous is not None:
                axes.plot([previous, place], [point.base, point.base], color="#888888", linewidth=0.8)
            previous = place
    axes.grid(axis="x", visible=False)
    angle = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if tilted else {}
    axes.set_xticks(range(len(labels)), labels, **angle)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    if any(series.faint for series in chart.series):
        axes.plot([], [], " ", label="paler: published, printed without an interval")


def _whisker(axes, place: float, value: float, point: Point) -> None:
    if point.low is None or point.high is None:
        return
    # The stages' interval is that of the whole, which their sum may pass a little.
    reach = [[max(0.0, value - point.low)], [max(0.0, point.high - value)]]
    axes.errorbar(place, value, yerr=reach, fmt="none", ecolor="#222222", elinewidth=1, capsize=2.5)


def _lines(axes, chart: Chart, palette: Palette) -> None:
    for series in chart.series:
        look = _look(series, palette)
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
            marker=None if curve else MARKERS[look.marker],
            markersize=4.5,
            label=_shown(series.name),
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
    """Matplotlib writes powers as TeX, which STYLE turns off."""
    for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_tick_params(which="minor", labelsize=7)


def _verdicts(axes, chart: Chart) -> None:
    """Rings around the points that were judged, each verdict with its own shape."""
    for verdict in Verdict:
        points = [point for series in chart.series for point in series.points if point.verdict == verdict.value]
        if points:
            colour, marker = VERDICTS[verdict]
            axes.plot(
                [_place(chart, point.x) for point in points],
                [point.y for point in points],
                linestyle="none",
                marker=MARKERS[marker],
                markersize=9,
                markerfacecolor="none",
                markeredgecolor=colour,
                markeredgewidth=1.4,
                label=verdict.value,
            )


def _place(chart: Chart, x):
    return datetime.fromtimestamp(x, timezone.utc) if chart.scale == "time" else x
