"""Chart descriptions, independent of the drawing (plots.py): values with intervals, axis labels with units, looks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from perf.report.results import Facets, Result

T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """A value with the bounds of its interval, if known. facets: None for a point that no filter hides.

    note: text of the tooltip; base: start of a floating bar; verdict: a value of Verdict, marked by a ring.
    """

    x: float | str
    y: float
    low: float | None = None
    high: float | None = None
    facets: Facets | None = None
    note: str = ""
    base: float = 0.0
    verdict: str | None = None


@dataclass(frozen=True)
class Series:
    """Points with a common name and look. form: `bar`, `line` (with markers), `markers` or `curve` (without markers).

    look: a key of palette.Palette. band: the bounds of an interval of the whole series. faint: published by others.
    """

    name: str
    look: str
    points: tuple[Point, ...]
    form: str = "line"
    band: tuple[float, float] | None = None
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart. name: of its files; summary: a text alternative.

    scale: `category`, `linear`, `log` or `time` (Unix seconds) of x. levels: (name, y) of horizontal lines. marks: (x, text)
    of vertical lines. zero: y starts at 0. places: order of a category axis; by default the order of the points. filled: the
    intervals of a line are one shaded area, for lines of many points.
    """

    name: str
    section: str
    title: str
    summary: str
    y_label: str
    series: tuple[Series, ...]
    x_label: str = "configuration"
    scale: str = "category"
    y_log: bool = False
    stacked: bool = False
    zero: bool = True
    levels: tuple[tuple[str, float], ...] = ()
    marks: tuple[tuple[float, str], ...] = ()
    places: tuple[str, ...] = ()
    filled: bool = False

    @property
    def points(self) -> list[Point]:
        """The points of all series."""
        return [point for series in self.series for point in series.points]


MOST_RESULTS = 60  # of one chart: a fleet has hundreds of machines of one name

SECTIONS = {
    "Launches": "Seconds per image of every launch, as in the article: median round, whiskers from the fastest to the "
    "slowest round; shaded: the interval of the median launch.",
    "GPUs": "Seconds per image by GPU, published values beside your own, and speed-ups over the original code, which any "
    "model and machine can be compared by. Whiskers are intervals; the articles print none, and warn that only values "
    "within one of their graphs compare reliably.",
    "Ladder": "Each step adds an optimisation to the one above: the change in seconds per image. Whiskers are the "
    "intervals of the resulting times.",
    "Stages": "Wall time of an image by stage. The whisker at the end of each piece is the interval of that piece over "
    "launches; runs saved before stages were recorded per round have none. `other` is the rest of the round.",
    "Growth": "Time and memory against steps, batch and image size, with a fit from three points on and the 95 % interval "
    "of its slope. Peak memory is a maximum, and has no interval.",
    "Roofline": "Achieved FLOP/s under the measured peaks of matrix products (flat) and memory copies (sloped). FLOPs count "
    "convolutions, matrix products and attention. Bytes are a minimum: weights, input and output of each network once per "
    "call; real traffic is higher, which moves points to the left. Whiskers are intervals; the roofs are maxima without one.",
    "Compiling": "Cumulative seconds over images, compilation included: compiling pays from the crossing of the lines on. "
    "Whiskers are the intervals of the images; only one launch compiles with a cold cache, so that its time has none.",
    "Energy": "Joules per image from the GPU's energy counter. Whiskers are intervals over launches.",
    "Kernels": "Seconds of one traced round (--perf-trace) by kernel class, outside the timed rounds. One round has no "
    "interval. On a GPU concurrent kernels both count in full; the launch gap is idle time. Fused kernels of compiled code "
    "on a CPU are `other`.",
    "Comparisons": "Change in time of each configuration against its reference (another commit or itself, interleaved, or "
    "stored sessions) in percent, with 95 % intervals and the margin. Below 0 is faster.",
    "History": "Each configuration over the stored sessions of a machine: a line for each software stack, its intervals "
    "shaded, with the verdicts other than SAME; dotted: the change points.",
}


def bar_each(points: Iterable[tuple[Result, Point]]) -> tuple[Series, ...]:
    """One bar per result, in the look of its technique and named after its place."""
    return tuple(Series(str(point.x), result.technique, (point,), "bar") for result, point in points)


def by_technique(results: Sequence[Result], point: Callable[[Result], Point], form: str = "line") -> tuple[Series, ...]:
    """One series per technique with a point for each of its results."""
    techniques = groups(results, lambda result: result.technique)
    return tuple(Series(name, name, tuple(map(point, members)), form) for name, members in techniques.items())


def short_id(result: Result) -> str:
    """The id without the model."""
    return result.id.removeprefix(f"{result.model}-")


def unit(results: Sequence[Result]) -> str:
    """The unit of the results' seconds, by their clock."""
    clocks = {str(result.session.facts.get("clock") or "unknown clock") for result in results}
    if clocks == {"cpu"}:
        return "s of CPU time"
    return "s (wall or CPU time: see the legend)" if "cpu" in clocks else "s"


def stamp(results: Sequence[Result]) -> str:
    """What a title says of sessions whose times are no evidence (INVALID) or approximate (drifted), else empty."""
    stamps = [result.session.stamp for result in results]
    shown = [name for name in ("INVALID", "drifted") if name in stamps]
    part = "partly " if shown and "" in stamps else ""
    return f" ({part}{' and '.join(shown)})" if shown else ""


def newest_of(results: Sequence[T], most: int = MOST_RESULTS) -> tuple[Sequence[T], str]:
    """The last `most` results, those of the newest sessions, and what a title says where others are left out."""
    return results[-most:], f" (the newest {most} of {len(results)})" if len(results) > most else ""


def groups(results: Sequence, key: Callable) -> dict:
    """Results or others by a key, in order of first appearance."""
    members: dict = {}
    for result in results:
        members.setdefault(key(result), []).append(result)
    return members


def valid(results: Sequence[Result]) -> list[Result]:
    """Results whose images passed the check; the others have no valid time."""
    return [result for result in results if result.benchmark.image_failure is None]
