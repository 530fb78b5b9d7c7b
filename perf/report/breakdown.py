"""Where the time goes and what it costs: the ladder, stages, kernels, energy, and what compiling takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from perf.configurations.sets import SETS
from perf.report.charts import Chart, Point, Series, bar_each, groups, short_id, unit, valid
from perf.report.palette import KERNEL_CLASSES, STAGES
from perf.report.results import Result
from perf.report.text import words_name

LADDER = [one.id.removeprefix("sd2-").removesuffix("-b1") for one in SETS["ladder"]]
MOST_BARS = 24


def _by_session(results: Sequence[Result]) -> Iterator[tuple[list[Result], str, str]]:
    """(members, title, stem of a file name) of each session, work and batch with at least one valid result."""
    found = groups(valid(results), lambda one: (one.session.identity, one.session.name, one.work, one.batch))
    for members in found.values():
        first = members[0]
        work = f"{first.work_name}, batch {first.batch}"
        title = f"{first.session.machine}, torch {first.session.torch}: {work}"
        yield members, title, words_name(first.session.machine, first.session.torch, work)


def _by_model(results: Sequence[Result]) -> Iterator[tuple[list[Result], str, str]]:
    """(members, title, stem of a file name) of each session and model, in portions that stay readable."""
    for members in groups(valid(results), lambda one: (one.session.identity, one.session.name, one.model)).values():
        first = members[0]
        title = f"{first.session.machine}, torch {first.session.torch}: {first.model}"
        for begin in range(0, len(members), MOST_BARS):
            number = f", part {begin // MOST_BARS + 1}" if len(members) > MOST_BARS else ""
            yield members[begin : begin + MOST_BARS], title + number, words_name(title + number)


def _stacked(parts: Sequence[str], members: Sequence[Result], point: Callable[[Result, str], Point | None]) -> tuple:
    """A series a part, which has its own look, with a piece of every member's bar."""
    pieces = {part: tuple(filter(None, (point(one, part) for one in members))) for part in parts}
    return tuple(Series(part, part, points, "bar") for part, points in pieces.items() if points)


def ladder_charts(results: Sequence[Result]) -> list[Chart]:
    """A waterfall of each session: the original first, each rung where it lies in the ladder, then from slow to fast."""
    charts = []
    for members, title, stem in _by_session(results):
        if len(members) < 2 or not any(one.technique.startswith("original") for one in members):
            continue
        rungs = _rungs(members)
        steps = [_step(before, one) for before, one in zip([None, *rungs], rungs)]
        charts.append(
            Chart(
                name=f"ladder_{stem}",
                section="Ladder",
                title=f"{title}: from the original on",
                summary=f"Waterfall of {len(rungs)} configurations from {rungs[0].id} to {rungs[-1].id}.",
                x_label="configuration",
                y_label=f"{unit(members)} per image",
                series=bar_each(zip(rungs, steps)),
            )
        )
    return charts


def _step(before: Result | None, one: Result) -> Point:
    """A floating bar from what there was before to what is left now."""
    start = before.seconds_per_image if before else 0.0
    change = f"{100 * (1 - one.seconds_per_image / start):+.1f} % less" if before else "where it starts"
    note = f"{one.seconds_per_image:.4g} s, {change}, {one.interval_name}"
    return Point(one.technique, one.seconds_per_image, *one.interval, one.facets, note, base=start)


def _rungs(members: Sequence[Result]) -> list[Result]:
    """The ladder's order for its members alone; else the slowest first, for then each step is what the next one saves."""
    if all(one.technique in LADDER for one in members):
        return sorted(members, key=lambda one: LADDER.index(one.technique))
    rest = sorted(members, key=lambda one: -one.seconds_per_image)
    return sorted(rest, key=lambda one: one.technique != "original")


def stage_charts(results: Sequence[Result]) -> list[Chart]:
    """Stacked seconds of text, UNet, VAE and the rest, each with its own interval."""
    charts = []
    for members, title, stem in _by_model([one for one in results if one.stages]):
        charts.append(
            Chart(
                name=f"stages_{stem}",
                section="Stages",
                title=f"{title}: by stage",
                summary=f"Seconds of wall time per image by stage of {len(members)} configurations.",
                x_label="configuration",
                y_label="s (wall time) per image",
                series=_stacked(tuple(STAGES), members, _stage),
                stacked=True,
            )
        )
    return charts


def _stage(one: Result, stage: str) -> Point | None:
    if stage not in one.stages:
        return None
    # On a GPU stages have the device's clock, so that they may pass the wall time, by a hair.
    found = one.stages[stage].over(one.batch)
    return Point(
        short_id(one), max(0.0, found.value), found.low, found.high, one.facets, f"{one.id}, {stage}, {found.name}"
    )


def kernel_charts(results: Sequence[Result]) -> list[Chart]:
    """Stacked seconds of a traced round by class of kernel."""
    charts = []
    for members, title, stem in _by_session([one for one in results if one.trace]):
        known = members[:MOST_BARS]
        classes = [name for name in KERNEL_CLASSES if any(name in one.trace for one in known)]
        charts.append(
            Chart(
                name=f"kernels_{stem}",
                section="Kernels",
                title=f"{title}: one round by class of kernel",
                summary=f"Seconds of one traced round by class of kernel, {len(known)} configurations.",
                x_label="configuration",
                y_label="s per round (wall time, with the profiler on)",
                series=_stacked(classes, known, _traced),
                stacked=True,
            )
        )
    return charts


def _traced(one: Result, name: str) -> Point:
    note = f"{one.id}, {name}: one round, which has no interval"
    return Point(one.technique, one.trace.get(name, 0.0), facets=one.facets, note=note)


def energy_charts(results: Sequence[Result]) -> list[Chart]:
    """Joules per image."""
    charts = []
    for members, title, stem in _by_model([one for one in results if one.joules]):
        points = [
            Point(
                short_id(one),
                one.joules.value,
                one.joules.low,
                one.joules.high,
                one.facets,
                f"{one.id}, {one.joules.name}",
            )
            for one in members
        ]
        charts.append(
            Chart(
                name=f"energy_{stem}",
                section="Energy",
                title=f"{title}: energy of an image",
                summary=f"Joules per image of {len(members)} configurations.",
                x_label="configuration",
                y_label="J per image",
                series=bar_each(zip(members, points)),
            )
        )
    return charts


def compile_charts(results: Sequence[Result]) -> list[Chart]:
    """Seconds spent after n images, eager against compiled, where a session has both; the first call has no interval."""
    charts = []
    for members, title, stem in _by_session(results):
        for compiled in members:
            eager = _eager(members, compiled)
            if eager is None or compiled.first_call[0] is None:
                continue
            spent = max(0.0, compiled.first_call[0] - compiled.benchmark.session_median)
            saving = eager.seconds_per_image - compiled.seconds_per_image
            far = 2 * spent / saving if saving > 0 and spent else 1000.0
            places = [far * step / 8 for step in range(9)]
            charts.append(
                Chart(
                    name=words_name("compiling", stem, compiled.technique),
                    section="Compiling",
                    title=f"{title}: {compiled.technique}, {_pays(compiled)}",
                    summary=f"Cumulative seconds over images, {eager.technique} against {compiled.technique}.",
                    x_label="images made",
                    y_label=f"{unit(members)} spent, compiling included",
                    series=(_spent(eager, 0.0, places), _spent(compiled, spent, places)),
                    scale="linear",
                )
            )
    return charts


def _eager(members: Sequence[Result], compiled: Result) -> Result | None:
    if compiled.compile == "none":
        return None
    wanted = dict(compiled.benchmark.configuration, compile="none", compile_scope="unet", id=None)
    found = (one for one in members if dict(one.benchmark.configuration, compile_scope="unet", id=None) == wanted)
    return next(found, None)


def _pays(one: Result) -> str:
    if one.amortise is None:
        return "break-even not computed (fewer than 6 launches, or nothing to compare with)"
    estimate, low, high = one.amortise
    if estimate is None:
        return "not shown to pay"
    return f"pays after {estimate} images [{low}, {'never' if high is None else high}]"


def _spent(one: Result, start: float, places: Sequence[float]) -> Series:
    low, high = one.interval
    points = [
        Point(n, start + n * one.seconds_per_image, start + n * low, start + n * high, one.facets, one.id)
        for n in places
    ]
    return Series(one.technique, one.technique, tuple(points), "line")
