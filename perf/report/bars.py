"""Bar charts by matplotlib: upright, or lying on their side where the labels would not fit under them on a small screen."""

from __future__ import annotations

import re
from collections.abc import Sequence

from perf.analysis.verdicts import Verdict
from perf.report.charts import Chart, Point, Series
from perf.report.palette import VERDICTS, Look, Palette

MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v", "cross": "P"}
MARKERS |= {"x": "X", "star": "*"}
LABEL_CHARACTERS, LABEL_LINES = 30, 3
PITCH = 0.84  # of the room at a label, what its bars take
BAR_INCHES, GAP_INCHES, LINE_INCHES = 0.13, 0.08, 0.15  # lying: a bar, between labels, a line of a label


def labels_of(chart: Chart) -> list[str]:
    """The places of a category axis, in order."""
    if chart.places:
        return list(chart.places)
    return list(dict.fromkeys(str(point.x) for series in chart.series for point in series.points))


def lies(labels: Sequence[str]) -> bool:
    """Whether bars over these labels lie: upright the labels would have to be tilted, or the figure be too wide."""
    longest = max(map(len, labels), default=0)
    return len(labels) > 6 or longest * len(labels) > 70


def wrapped(label: str) -> str:
    """A label in a few short lines; what is longer ends in an ellipsis (the page and the tables have it whole)."""
    lines = [""]
    for word in re.findall(rf"[^-_+ ,]{{0,{LABEL_CHARACTERS - 1}}}[-_+ ,]?", label):  # as page.js does
        if lines[-1] and len((lines[-1] + word).rstrip()) > LABEL_CHARACTERS:
            lines.append("")
        lines[-1] += word
    kept = [line.rstrip() for line in lines[:LABEL_LINES]]
    if len(lines) > LABEL_LINES:
        kept[-1] = kept[-1][: LABEL_CHARACTERS - 1] + "…"
    return "\n".join(kept)


def _counts(chart: Chart, labels: Sequence[str]) -> dict[str, int]:
    counts = dict.fromkeys(labels, 0)
    for series in chart.series:
        for point in series.points:
            counts[str(point.x)] += 1
    return counts


def hidden(chart: Chart, series: Series) -> bool:
    """A published series has the look of the reader's own, and one entry for both is enough."""
    return series.faint and series.look in {one.name for one in chart.series}


def shown(name: str) -> str:
    """Matplotlib leaves names that begin with _ out of a legend."""
    return f" {name}" if name.startswith("_") else name


def draw_bars(axes, chart: Chart, palette: Palette, labels: Sequence[str]) -> None:
    """All bars with their whiskers, verdicts and category axis."""
    made = _Bars(axes, chart, labels)
    for number, series in enumerate(chart.series):
        for at, point in enumerate(series.points):
            name = None if at or hidden(chart, series) else shown(series.name)
            made.bar(point, palette[series.look], series.faint, name, number)
    made.finish()


class _Bars:
    """Where the next bar goes. `along` is the axis of the values, upright y and lying x."""

    def __init__(self, axes, chart: Chart, labels: Sequence[str]):
        self.axes, self.chart, self.labels, self.lie = axes, chart, labels, lies(labels)
        self.counts, self.done = _counts(chart, labels), dict.fromkeys(labels, 0)
        self.tops = dict.fromkeys(labels, 0.0)
        rooms = rooms_of(chart, labels) if self.lie else [1.0] * len(labels)
        self.middles = [sum(rooms[:at]) + room / 2 for at, room in enumerate(rooms)]
        self.ends = 0.0, sum(rooms)
        beside = 1 if chart.stacked else max(self.counts.values(), default=1)
        self.room = (0.2 if beside == 1 else BAR_INCHES) if self.lie else PITCH / beside
        self.judged: list[tuple[float, float, str]] = []
        self.before: float | None = None

    def bar(self, point: Point, look: Look, faint: bool, name: str | None, number: int) -> None:
        """One bar, or one piece of a stack: that of the series `number`."""
        label, stacked = str(point.x), self.chart.stacked
        place = self.middles[self.labels.index(label)]
        if not stacked:
            place += (self.done[label] - (self.counts[label] - 1) / 2) * self.room
        self.done[label] += 1
        base = self.tops[label] if stacked else point.base
        end = base + point.y if stacked else point.y
        self.tops[label] = end
        draw = self.axes.barh if self.lie else self.axes.bar
        draw(
            place,
            end - base,
            self.room * 0.92,
            **{"left" if self.lie else "bottom": base},
            color=look.colour,
            alpha=0.45 if faint else 1.0,
            hatch=(look.hatch * 3 or None) if not faint else None,
            edgecolor="white",
            linewidth=0.4,
            label=name,
        )
        # The whiskers of a stack's pieces stand beside each other, for the ends of small pieces lie close together.
        aside = (
            (number - (len(self.chart.series) - 1) / 2) * self.room / (len(self.chart.series) + 1) if stacked else 0.0
        )
        self._whisker(place + aside, end, point)
        if point.base and self.before is not None:
            self._plot([self.before, place], [point.base, point.base], color="#888888", linewidth=0.8)
        self.before = place
        if point.verdict:
            self.judged.append((place, end, point.verdict))

    def _plot(self, places: Sequence[float], values: Sequence[float], **how) -> None:
        self.axes.plot(*((values, places) if self.lie else (places, values)), **how)

    def _whisker(self, place: float, end: float, point: Point) -> None:
        if point.low is None or point.high is None:
            return
        reach = [[max(0.0, point.y - point.low)], [max(0.0, point.high - point.y)]]
        at = (end, place) if self.lie else (place, end)
        error = {"xerr" if self.lie else "yerr": reach}
        self.axes.errorbar(*at, **error, fmt="none", ecolor="#222222", elinewidth=1, capsize=2.5)

    def finish(self) -> None:
        """The category axis, and what the legend says beside the series."""
        for verdict in Verdict:
            found = [(place, end) for place, end, name in self.judged if name == verdict.value]
            if found:
                self._plot(*zip(*found), **ring(verdict))
        texts = [wrapped(label) for label in self.labels]
        if self.lie:
            self.axes.set_yticks(self.middles, texts)
            self.axes.set_ylim(*reversed(self.ends))
        else:
            self.axes.set_xticks(self.middles, texts)
            self.axes.set_xlim(*self.ends)
        self.axes.grid(axis="y" if self.lie else "x", visible=False)
        if any(series.faint for series in self.chart.series):
            self.axes.plot([], [], " ", label="paler: published, printed without an interval")


def ring(verdict: Verdict) -> dict:
    """How a point that was judged is marked: each verdict has its own shape."""
    colour, marker = VERDICTS[verdict]
    how = {"linestyle": "none", "marker": MARKERS[marker], "markersize": 9, "markerfacecolor": "none"}
    return {**how, "markeredgecolor": colour, "markeredgewidth": 1.4, "label": verdict.value}


def size_of_labels(labels: Sequence[str]) -> tuple[float, float]:
    """Inches that the labels take: beside lying bars, and under upright ones beyond their first line."""
    lines = [wrapped(label).split("\n") for label in labels]
    longest = max((len(line) for one in lines for line in one), default=0)
    return 0.075 * longest + 0.15, 0.15 * (max(map(len, lines), default=1) - 1)


def rooms_of(chart: Chart, labels: Sequence[str]) -> list[float]:
    """Inches that each label of lying bars takes, by its bars and the lines of its name."""
    counts = dict.fromkeys(labels, 1) if chart.stacked else _counts(chart, labels)
    return [
        max(0.2, LINE_INCHES * (wrapped(label).count("\n") + 1), BAR_INCHES * counts[label]) + GAP_INCHES
        for label in labels
    ]
