"""Draw bar charts. Bars lie, so that their labels are readable on a desk and on a phone alike."""

from __future__ import annotations

import re
from collections import Counter

from matplotlib.patches import Patch

from perf.report.canvas import INK, PAPER, Canvas
from perf.report.charts import Chart, Point, Series
from perf.report.palette import Look, Palette

LABEL_CHARACTERS, LABEL_LINES = 22, 3
BAR_INCHES, GAP_INCHES, LINE_INCHES = 0.13, 0.08, 0.15  # a bar, between labels, a line of a label


def labels_of(chart: Chart) -> list[str]:
    """The places of a category axis, in order."""
    return list(chart.places or dict.fromkeys(str(point.x) for point in chart.points))


def wrapped(label: str) -> str:
    """Wrap a label into a few short lines; a longer one ends in an ellipsis (tooltips and tables have it whole)."""
    lines = [""]
    for word in re.findall(rf"[^-_+ ,]{{0,{LABEL_CHARACTERS - 1}}}[-_+ ,]?", label):
        if lines[-1] and len((lines[-1] + word).rstrip()) > LABEL_CHARACTERS:
            lines.append("")
        lines[-1] += word
    lines = [line.rstrip() for line in lines]
    if len(lines) > LABEL_LINES:
        lines[LABEL_LINES - 1] = lines[LABEL_LINES - 1][: LABEL_CHARACTERS - 1] + "…"
    return "\n".join(lines[:LABEL_LINES])


def draw_bars(chart: Chart, palette: Palette) -> tuple[Canvas, float]:
    """Draw all bars with whiskers, verdicts, legend and category axis; returns also the height of the axes in inches."""
    bars = _Bars(chart)
    legend = chart.stacked or any(
        (series.points[0].x, len(series.points)) != (series.name, 1) for series in chart.series
    )
    own = {series.name for series in chart.series}
    for number, series in enumerate(chart.series):
        for point in series.points:
            bars.add(series, number, point, palette[series.look])
    for series in sorted(chart.series, key=lambda series: series.faint) if legend and len(chart.series) > 1 else ():
        name = series.look if series.look in own else series.name  # one entry for own and published bars
        patch = Patch(**_style(palette[series.look], series.faint))
        bars.canvas.legend(name, patch, [point.facets for point in series.points])
    if legend and any(series.faint for series in chart.series):
        published = [point.facets for series in chart.series if series.faint for point in series.points]
        bars.canvas.legend("paler: published, without an interval", Patch(alpha=0), published)
    return bars.canvas, bars.finish()


def _style(look: Look, faint: bool) -> dict:
    hatch = None if faint else look.hatch * 3 or None
    style = {"facecolor": look.colour, "alpha": 0.45 if faint else 1.0, "hatch": hatch}
    return {**style, "edgecolor": PAPER, "linewidth": 0.4}


class _Bars:
    """The free position at each label."""

    def __init__(self, chart: Chart):
        self.chart, self.labels = chart, labels_of(chart)
        self.canvas = Canvas(chart, lying=True)
        self.counts = Counter(str(point.x) for point in chart.points)
        self.drawn, self.tops = Counter(), dict.fromkeys(self.labels, 0.0)
        most = 1 if chart.stacked else max(self.counts.values(), default=1)
        rooms, self.width = list(map(self._room, self.labels)), 0.2 if most == 1 else BAR_INCHES
        self.middles = {label: sum(rooms[:at]) + room / 2 for at, (label, room) in enumerate(zip(self.labels, rooms))}
        self.length = sum(rooms)
        self.before: tuple[float, Point] | None = None

    def _room(self, label: str) -> float:
        """Inches of a label by its bars and lines."""
        bars = 1 if self.chart.stacked else self.counts[label]
        return max(0.2, LINE_INCHES * (wrapped(label).count("\n") + 1), BAR_INCHES * bars) + GAP_INCHES

    def add(self, series: Series, number: int, point: Point, look: Look) -> None:
        """Draw one bar, or one piece of a stack."""
        label, stacked, canvas = str(point.x), self.chart.stacked, self.canvas
        place = self.middles[label]
        if not stacked:
            place += (self.drawn[label] - (self.counts[label] - 1) / 2) * self.width
        self.drawn[label] += 1
        base = self.tops[label] if stacked else point.base
        end = self.tops[label] = base + point.y if stacked else point.y
        (bar,) = canvas.axes.barh(place, end - base, self.width * 0.92, left=base, **_style(look, series.faint))
        title = series.name if series.name == label else f"{series.name}, {label}"
        canvas.mark(bar, [point.facets], canvas.tooltip(title, point))
        # Whiskers of a stack stand beside each other, because the ends of small pieces lie close together.
        pieces = len(self.chart.series)
        aside = (number - (pieces - 1) / 2) * self.width / (pieces + 1) if stacked else 0.0
        canvas.whisker(place + aside, end, point, INK)
        if point.base and self.before:
            facets = [self.before[1].facets, point.facets]
            canvas.plot([self.before[0], place], [point.base] * 2, facets, color="#888888", linewidth=0.8)
        self.before = place, point
        canvas.ring(place, end, point)

    def finish(self) -> float:
        """Draw the category axis; returns the height of the axes in inches."""
        axes, texts = self.canvas.axes, [wrapped(label) for label in self.labels]
        axes.set_yticks(list(self.middles.values()), texts)
        axes.set_ylim(self.length, 0.0)
        axes.grid(axis="y", visible=False)
        for tick, label in zip(axes.get_yticklabels(), self.labels):
            self.canvas.mark(tick, [point.facets for point in self.chart.points if str(point.x) == label], legend=True)
        return max(1.2, self.length)
