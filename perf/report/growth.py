"""Charts of time and memory against steps, batch and image size, with fitted growth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from perf.analysis.statistics import student_quantile
from perf.configurations.configuration import NATIVE_PIXELS
from perf.report.charts import Chart, Point, Series, by_technique, groups, stamp, unit, valid
from perf.report.results import Result
from perf.report.text import joined_name


@dataclass(frozen=True)
class Fit:
    """Least squares of y = fixed + slope * x; for a power law of the logarithms, with the exponent as `slope`.

    low, high: 95 % interval of the slope by Student's t over the medians.
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
    """Fit the growth of y with x; None for fewer than three different x."""
    if len(set(xs)) < 3:
        return None
    if power:
        xs, ys = [math.log(x) for x in xs], [math.log(y) for y in ys]
    slope, fixed = statistics.linear_regression(xs, ys)
    squares = sum((y - fixed - slope * x) ** 2 for x, y in zip(xs, ys))
    degrees, middle = len(xs) - 2, statistics.fmean(xs)
    error = math.sqrt(squares / degrees / sum((x - middle) ** 2 for x in xs))
    half = student_quantile(0.975, degrees) * error
    return Fit(fixed, slope, slope - half, slope + half, power)


def pixels(result: Result) -> int:
    """Pixels of an image; the model's own size where none is configured."""
    native = NATIVE_PIXELS.get(result.model, 0)
    return (result.size[0] or native) * (result.size[1] or native)


@dataclass(frozen=True)
class Axis:
    """A varied quantity. formula: of the fit, with the fields of Fit; power: whether the fit is a power law."""

    name: str
    label: str
    value: Callable[[Result], float]
    formula: str
    power: bool = False


AXES = (
    Axis(
        "steps",
        "sampler steps",
        lambda result: result.steps,
        "{slope:.3g} [{low:.3g}, {high:.3g}] s a step + {fixed:.3g} s",
    ),
    Axis(
        "batch",
        "batch, images per round",
        lambda result: result.batch,
        "{slope:.3g} [{low:.3g}, {high:.3g}] s an image + {fixed:.3g} s a round",
    ),
    Axis("size", "pixels per image", pixels, "as pixels to the {slope:.2f} [{low:.2f}, {high:.2f}]", power=True),
)


def growth_charts(results: Sequence[Result]) -> list[Chart]:
    """Time of a round and peak memory over each axis that a session varies."""
    charts = []
    for axis in AXES:

        def constant(result: Result, axis: Axis = axis) -> tuple:
            others = {"steps": result.steps, "batch": result.batch, "size": result.size, axis.name: None}
            return (
                result.session.identity,
                result.torch,
                result.model,
                result.workload,
                result.sampler,
                result.sampling,
                *others.values(),
            )

        for members in groups(valid(results), constant).values():
            lines = groups(sorted(members, key=axis.value), lambda result: result.technique).values()
            varied = [result for line in lines if len(set(map(axis.value, line))) > 1 for result in line]
            if not varied:
                continue
            charts.append(_time_chart(axis, varied))
            if axis.name != "steps" and any(result.peak_bytes for result in varied):
                charts.append(_memory_chart(axis, [result for result in varied if result.peak_bytes]))
    return charts


def _names(axis: Axis, members: Sequence[Result]) -> tuple[str, str]:
    """Title, and stem of a file name."""
    first = members[0]
    work = first.work_name if axis.name == "batch" else f"{first.model}, batch {first.batch}"
    machine = f"{first.session.machine}, torch {first.torch}"
    return f"{machine}{stamp(members)}: {work}", joined_name(axis.name, machine, work)


def _time_chart(axis: Axis, members: Sequence[Result]) -> Chart:
    title, stem = _names(axis, members)

    def point(result: Result) -> Point:
        seconds, low, high = (result.images * value for value in (result.seconds_per_image, *result.interval))
        return Point(axis.value(result), seconds, low, high, result.facets, f"{result.id}, {result.interval_name}")

    series = []
    for line in by_technique(members, point):
        curve = _curve(line, axis)
        series += [Series(line.name, line.look, line.points, "markers"), curve] if curve else [line]
    return Chart(
        name=f"cost_{stem}",
        section="Growth",
        title=f"{title}: time against {axis.name}",
        summary=f"Seconds per round over {axis.label}, {len({result.technique for result in members})} configurations.",
        x_label=axis.label,
        y_label=f"{unit(members)} per round",
        series=tuple(series),
        scale="linear",
    )


def _curve(line: Series, axis: Axis) -> Series | None:
    """The fit of a series."""
    growth = fit([point.x for point in line.points], [point.y for point in line.points], axis.power)
    if growth is None:
        return None
    first, last = line.points[0].x, line.points[-1].x
    xs = [first + (last - first) * step / 20 for step in range(21)]
    points = tuple(Point(x, growth.at(x), facets=line.points[0].facets) for x in xs)
    return Series(f"{line.name}: {axis.formula.format(**vars(growth))}", line.look, points, "curve")


def _memory_chart(axis: Axis, members: Sequence[Result]) -> Chart:
    title, stem = _names(axis, members)

    def point(result: Result) -> Point:
        return Point(
            axis.value(result),
            result.peak_bytes / 2**30,
            facets=result.facets,
            note=f"{result.id}: a peak, no interval",
        )

    series = by_technique(members, point)
    return Chart(
        name=f"memory_{stem}",
        section="Growth",
        title=f"{title}: peak memory against {axis.name}",
        summary=f"Peak memory over {axis.label}, {len(series)} configurations.",
        x_label=axis.label,
        y_label="peak memory, GiB",
        series=series,
        scale="linear",
    )
