"""Cost and memory against steps, batch and picture size, with the growth fitted. Pure: the standard library only."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from perf.analysis.statistics import student_quantile
from perf.report.charts import Chart, Point, Series, groups, unit, valid
from perf.report.results import Result
from perf.report.text import words_name

NATIVE_PIXELS = {"tiny": 64, "sd1": 512, "sd2": 512, "sd2-v": 768}


@dataclass(frozen=True)
class Fit:
    """Least squares of y = fixed + slope * x; on logarithms for a power, whose exponent is `slope`.

    low, high: the slope's 95 % interval by Student's t; over medians, so that it says how straight they lie.
    """

    fixed: float
    slope: float
    low: float
    high: float
    power: bool

    def at(self, x: float) -> float:
        """The fitted value."""
        return math.exp(self.fixed) * x**self.slope if self.power else self.fixed + self.slope * x


def fit(xs: Sequence[float], ys: Sequence[float], power: bool = False) -> Fit | None:
    """The growth of y with x; None for fewer than three different x, for two lie on every line."""
    if len(set(xs)) < 3:
        return None
    if power:
        xs, ys = [math.log(x) for x in xs], [math.log(y) for y in ys]
    slope, fixed = statistics.linear_regression(xs, ys)
    residuals = [y - fixed - slope * x for x, y in zip(xs, ys)]
    degrees = len(xs) - 2
    middle = statistics.fmean(xs)
    spread = math.sqrt(sum(one * one for one in residuals) / degrees / sum((x - middle) ** 2 for x in xs))
    half = student_quantile(0.975, degrees) * spread
    return Fit(fixed, slope, slope - half, slope + half, power)


def pixels(result: Result) -> int:
    """Pixels of a picture, the model's own where none are named."""
    native = NATIVE_PIXELS.get(result.model, 0)
    return (result.size[0] or native) * (result.size[1] or native)


# name, words of the x axis, value of a result, whether as a power, and how the fit is said
AXES = (
    (
        "steps",
        "sampler steps",
        lambda one: one.steps,
        False,
        "{slope:.3g} [{low:.3g}, {high:.3g}] s a step + {fixed:.3g} s",
    ),
    (
        "batch",
        "batch, images per round",
        lambda one: one.batch,
        False,
        "{slope:.3g} [{low:.3g}, {high:.3g}] s an image + {fixed:.3g} s a round",
    ),
    ("size", "pixels per image", pixels, True, "as pixels to the {slope:.2f} [{low:.2f}, {high:.2f}]"),
)


def _held(axis: str, one: Result) -> tuple:
    """All but what the axis varies."""
    varied = {"steps": one.steps, "batch": one.batch, "size": one.size}
    del varied[axis]
    machine = (one.session.identity, one.torch)
    return (*machine, one.model, one.workload, one.sampler, *varied.values())


def growth_charts(results: Sequence[Result]) -> list[Chart]:
    """Time of a round, and peak memory, over each axis along which a session varies."""
    charts = []
    for axis, words, value, power, said in AXES:
        for members in groups(valid(results), functools.partial(_held, axis)).values():
            lines = groups(members, lambda one: one.technique)
            lines = {name: sorted(ones, key=value) for name, ones in lines.items() if len({*map(value, ones)}) > 1}
            if lines:
                charts.append(_cost(axis, words, value, power, said, lines))
                if axis != "steps" and any(one.peak_bytes for ones in lines.values() for one in ones):
                    charts.append(_memory(axis, words, value, lines))
    return charts


def _names(axis: str, lines: dict) -> tuple[list[Result], str, str]:
    members = [one for ones in lines.values() for one in ones]
    first = members[0]
    work = first.model if axis in ("steps", "size") else first.work_name
    held = "" if axis == "batch" else f", batch {first.batch}"
    machine = f"{first.session.machine}, torch {first.torch}"
    return members, f"{machine}: {work}{held}", words_name(axis, machine, f"{work}{held}")


def _cost(axis: str, words: str, value, power: bool, said: str, lines: dict) -> Chart:
    members, title, stem = _names(axis, lines)
    series = []
    for technique, ones in lines.items():
        points = []
        for one in ones:
            low, high = (one.batch * bound for bound in one.interval)
            note = f"{one.id}, {one.interval_name}"
            points.append(Point(value(one), one.batch * one.seconds_per_image, low, high, one.facets, note))
        found = fit([point.x for point in points], [point.y for point in points], power)
        series.append(Series(technique, technique, tuple(points), "markers" if found else "line"))
        if found:
            series.append(_curve(technique, points, found, said))
    return Chart(
        name=f"cost_{stem}",
        section="Growth",
        title=f"{title}: time against {axis}",
        summary=f"Seconds of a round over {words}, {len(lines)} configurations.",
        x_label=words,
        y_label=f"{unit(members)} per round",
        series=tuple(series),
        scale="linear",
    )


def _curve(technique: str, points: Sequence[Point], found: Fit, said: str) -> Series:
    first, last = points[0].x, points[-1].x
    places = [first + (last - first) * step / 20 for step in range(21)]
    name = f"{technique}: {said.format(slope=found.slope, fixed=found.fixed, low=found.low, high=found.high)}"
    facets = points[0].facets
    return Series(name, technique, tuple(Point(x, found.at(x), facets=facets) for x in places), "curve")


def _memory(axis: str, words: str, value, lines: dict) -> Chart:
    _, title, stem = _names(axis, lines)
    series = []
    for technique, ones in lines.items():
        points = [
            Point(
                value(one), one.peak_bytes / 2**30, facets=one.facets, note=f"{one.id}: a peak, which has no interval"
            )
            for one in ones
            if one.peak_bytes
        ]
        if points:
            series.append(Series(technique, technique, tuple(points), "line"))
    return Chart(
        name=f"memory_{stem}",
        section="Growth",
        title=f"{title}: peak memory against {axis}",
        summary=f"Peak memory over {words}, {len(series)} configurations.",
        x_label=words,
        y_label="peak memory, GiB",
        series=tuple(series),
        scale="linear",
    )
