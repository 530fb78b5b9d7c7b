"""What a chart shows, apart from who draws it: matplotlib (plots.py) and plotly (page.py) draw the same values.

Intervals are part of a point. A chart names the unit on both axes; bars always start at zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from perf.report.results import Facets, Result

Place = float | str


@dataclass(frozen=True)
class Point:
    """A value with the bounds of its interval, where it has one; base: where a floating bar starts."""

    x: Place
    y: float
    low: float | None = None
    high: float | None = None
    facets: Facets | None = None  # None stays, whatever is filtered
    note: str = ""
    base: float = 0.0
    verdict: str | None = None


@dataclass(frozen=True)
class Series:
    """Points of one name and look. form: `bar`, `line` (with markers), `markers` or `curve` (without).

    look: a technique, or a key of palette.STAGES or palette.KERNEL_CLASSES in charts that are `stacked`. band: the bounds
    of an interval that belongs to the series as a whole. faint: of others, or without an interval.
    """

    name: str
    look: str
    points: tuple[Point, ...]
    form: str = "line"
    band: tuple[float, float] | None = None
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart. name: of its files; summary: what it shows, for those who do not see it.

    scale: `category`, `linear`, `log` or `time` (Unix seconds) of x. levels: (name, y) horizontal lines. marks: (x, words)
    vertical lines. zero: y starts at 0. places: the order of a category axis, that of the points where it is empty.
    """

    name: str
    section: str
    title: str
    summary: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    scale: str = "category"
    y_log: bool = False
    stacked: bool = False
    zero: bool = True
    levels: tuple[tuple[str, float], ...] = ()
    marks: tuple[tuple[float, str], ...] = ()
    places: tuple[str, ...] = ()

    @property
    def labelled_marks(self) -> list[int]:
        """Which marks have room for their words; of those that stand close together the first."""
        xs = [point.x for series in self.series for point in series.points]
        if not self.marks or not xs:
            return []
        room, last, found = 0.05 * (max(xs) - min(xs)), None, []
        for number, (x, _) in enumerate(self.marks):
            if last is None or x - last >= room:
                found.append(number)
                last = x
        return found


SECTIONS = {
    "Launches": "Every launch of every configuration, as the article plotted them: seconds per image of its median "
    "round, whiskers from its fastest to its slowest round; shaded, the interval of the median launch.",
    "GPUs": "Seconds per image by GPU, published figures beside your own. Whiskers are intervals; the articles print none. "
    "They also warn that only numbers inside one graph of theirs compare reliably.",
    "Ladder": "One optimisation at a time: what each step takes off the time of an image. Whiskers are the intervals of "
    "the times reached.",
    "Stages": "Where the time of an image goes, in wall time. The whisker at the end of each piece is that piece's own interval, "
    "over launches; runs saved before the stages of each round were have none. What the stages leave of the round is called other.",
    "Growth": "Cost and memory against steps, batch and picture size, with fitted growth from three points on and the 95 % "
    "interval of its slope. A peak of memory is a maximum, and has no interval.",
    "Roofline": "FLOP/s reached under what this device was measured to reach in matrix products (flat) and in copies of memory "
    "(sloped). FLOPs are the multiplications of convolutions, matrices and attention. The bytes are a floor: weights, input "
    "and output of each network once a call; what really moves is more, so that points belong further left. Whiskers are "
    "intervals; the roofs are maxima, which have none.",
    "Compiling": "Seconds spent after so many images, compiling included: where the lines cross, it has paid. Whiskers are the "
    "intervals of the images; one launch alone compiles with a cold cache, so that its time has none.",
    "Energy": "Joules per image from the GPU's energy counter. Whiskers are intervals over launches.",
    "Kernels": "Seconds of one traced round by class of kernel (--perf-trace), outside the timed rounds. One round has no "
    "interval. On a GPU what runs beside another counts fully; the launch gap is when nothing ran. The fused kernels of "
    "compiled code on a CPU are other.",
    "Comparisons": "By how many percent each configuration takes more time than what it was compared with - another commit "
    "or itself in one interleave, or stored sessions - with 95 % intervals and the bounds of the margin. Below 0 is faster.",
    "History": "Each configuration over stored sessions, with verdicts, and where commit, GPU or versions changed.",
}


def measured(result: Result, x: Place, note: str = "") -> Point:
    """A result's seconds per image at a place, with its interval."""
    low, high = result.interval
    words = f"{result.id}, {result.session.name}, {result.interval_name}"
    return Point(x, result.seconds_per_image, low, high, result.facets, f"{words}; {note}" if note else words)


def bar_each(points: Iterable[tuple[Result, Point]]) -> tuple[Series, ...]:
    """A bar for each result, in its own look and over its own name, which is the point's place."""
    return tuple(Series(str(point.x), one.technique, (point,), "bar") for one, point in points)


def short_id(one: Result) -> str:
    """The id without the model, for a chart that has only one."""
    return one.id.removeprefix(f"{one.model}-")


def unit(results: Sequence[Result]) -> str:
    """What a second of these results is, for an axis."""
    clocks = {str(one.session.facts.get("clock") or "unknown clock") for one in results}
    return (
        "s of CPU time" if clocks == {"cpu"} else "s" if "cpu" not in clocks else "s (wall or CPU time: see the legend)"
    )


def synthetic(results: Sequence[Result]) -> str:
    """What a title must say where not all was measured."""
    if any(one.session.synthetic for one in results):
        return " (synthetic)" if all(one.session.synthetic for one in results) else " (partly synthetic)"
    return ""


def groups(results: Sequence[Result], key) -> dict:
    """Results by a key, in order of their first."""
    found: dict = {}
    for one in results:
        found.setdefault(key(one), []).append(one)
    return found


def valid(results: Sequence[Result]) -> list[Result]:
    """Without those whose picture is wrong: they have no time."""
    return [one for one in results if one.benchmark.image_failure is None]
