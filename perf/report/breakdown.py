"""Charts of where time and energy go: the ladder, stages, kernel classes, energy, and the cost of compiling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from perf.configurations.sets import SETS
from perf.report.charts import Chart, Point, Series, bar_each, groups, short_id, stamp, unit, valid
from perf.report.palette import KERNEL_CLASSES, STAGES
from perf.report.results import Result
from perf.report.text import joined_name

LADDER = [configuration.id.removeprefix("sd2-").removesuffix("-b1") for configuration in SETS["ladder"]]
MOST_BARS = 24
Group = tuple[list[Result], str, str]  # results, title, stem of a file name


def _by_session(results: Sequence[Result]) -> Iterator[Group]:
    """Valid results of each session, work and batch."""
    by_chart = groups(
        valid(results), lambda result: (result.session.identity, result.session.name, result.work, result.batch)
    )
    for members in by_chart.values():
        session, work = members[0].session, f"{members[0].work_name}, batch {members[0].batch}"
        title = f"{session.machine}, torch {session.torch}{stamp(members)}: {work}"
        yield members, title, joined_name(session.machine, session.torch, work)


def _by_model(results: Sequence[Result]) -> Iterator[Group]:
    """Valid results of each session and model, at most MOST_BARS at a time."""
    for members in groups(
        valid(results), lambda result: (result.session.identity, result.session.name, result.model)
    ).values():
        session = members[0].session
        for begin in range(0, len(members), MOST_BARS):
            part = f", part {begin // MOST_BARS + 1}" if len(members) > MOST_BARS else ""
            machine, model = f"{session.machine}, torch {session.torch}", f"{members[0].model}{part}"
            title = f"{machine}{stamp(members)}: {model}"
            yield members[begin : begin + MOST_BARS], title, joined_name(machine, model)


def _stacked(
    parts: Sequence[str], members: Sequence[Result], point: Callable[[Result, str], Point | None]
) -> tuple[Series, ...]:
    """One series per part, with a piece of each result's bar."""
    pieces = {part: tuple(filter(None, (point(result, part) for result in members))) for part in parts}
    return tuple(Series(part, part, points, "bar") for part, points in pieces.items() if points)


def ladder_charts(results: Sequence[Result]) -> list[Chart]:
    """A waterfall per session whose configurations each add an optimisation to the one before, as the set `ladder` does."""
    charts = []
    for members, title, stem in _by_session(results):
        rungs = sorted(
            (result for result in members if result.technique in LADDER),
            key=lambda result: LADDER.index(result.technique),
        )
        if len(rungs) < 3 or len(rungs) < len(members):
            continue
        steps = [_step(before, result) for before, result in zip([None, *rungs], rungs)]
        charts.append(
            Chart(
                name=f"ladder_{stem}",
                section="Ladder",
                title=f"{title}: from the original on",
                summary=f"Waterfall of {len(rungs)} configurations from {rungs[0].id} to {rungs[-1].id}.",
                y_label=f"{unit(members)} per image",
                series=bar_each(zip(rungs, steps)),
            )
        )
    return charts


def _step(before: Result | None, result: Result) -> Point:
    """A floating bar from the previous time to the time reached."""
    start = before.seconds_per_image if before else 0.0
    change = f"{100 * (1 - result.seconds_per_image / start):+.1f} % less" if before else "start"
    note = f"{result.seconds_per_image:.4g} s, {change}, {result.interval_name}"
    return Point(result.technique, result.seconds_per_image, *result.interval, result.facets, note, base=start)


def stage_charts(results: Sequence[Result]) -> list[Chart]:
    """Stacked seconds of text encoder, UNet, VAE and the rest, each with its interval."""
    return [
        Chart(
            name=f"stages_{stem}",
            section="Stages",
            title=f"{title}: by stage",
            summary=f"Seconds of wall time per image by stage of {len(members)} configurations.",
            y_label="s (wall time) per image",
            series=_stacked(tuple(STAGES), members, _stage),
            stacked=True,
        )
        for members, title, stem in _by_model([result for result in results if result.stages])
    ]


def _stage(result: Result, stage: str) -> Point | None:
    if stage not in result.stages:
        return None
    time = result.stages[stage].per(result.images)
    note = f"{result.id}, {stage}, {time.name}"
    # Stages on a GPU have the device's clock, so that their sum may exceed the wall time and `other` be negative.
    return Point(short_id(result), max(0.0, time.value), time.low, time.high, result.facets, note)


def kernel_charts(results: Sequence[Result]) -> list[Chart]:
    """Stacked seconds of a traced round by kernel class."""
    charts = []
    for members, title, stem in _by_session([result for result in results if result.trace]):
        members = members[:MOST_BARS]
        classes = [name for name in KERNEL_CLASSES if any(name in result.trace for result in members)]
        charts.append(
            Chart(
                name=f"kernels_{stem}",
                section="Kernels",
                title=f"{title}: one round by kernel class",
                summary=f"Seconds of one traced round by kernel class, {len(members)} configurations.",
                y_label="s per round (wall time, with the profiler on)",
                series=_stacked(classes, members, _traced),
                stacked=True,
            )
        )
    return charts


def _traced(result: Result, name: str) -> Point:
    note = f"{result.id}, {name}: one round, no interval"
    return Point(result.technique, result.trace.get(name, 0.0), facets=result.facets, note=note)


def energy_charts(results: Sequence[Result]) -> list[Chart]:
    """Joules per image."""
    return [
        Chart(
            name=f"energy_{stem}",
            section="Energy",
            title=f"{title}: energy per image",
            summary=f"Joules per image of {len(members)} configurations.",
            y_label="J per image",
            series=bar_each((result, _energy(result)) for result in members),
        )
        for members, title, stem in _by_model([result for result in results if result.joules])
    ]


def _energy(result: Result) -> Point:
    joules = result.joules
    return Point(short_id(result), joules.value, joules.low, joules.high, result.facets, f"{result.id}, {joules.name}")


def compile_charts(results: Sequence[Result]) -> list[Chart]:
    """Cumulative seconds over images, eager against compiled; the first call has no interval."""
    charts = []
    for members, title, stem in _by_session(results):
        for compiled in members:
            eager, facts = _eager(members, compiled), compiled.session.facts
            if eager is None or compiled.first_call[0] is None:
                continue
            if facts.get("clock") == "cpu" and facts.get("threads") != 1:
                continue  # the CPU time of several threads and the wall time of compiling have no common axis
            compiling = max(0.0, compiled.first_call[0] - compiled.benchmark.session_median)
            saving = eager.seconds_per_image - compiled.seconds_per_image
            most = 2 * compiling / saving if saving > 0 and compiling else 1000.0
            images = [most * step / 8 for step in range(9)]
            charts.append(
                Chart(
                    name=joined_name("compiling", stem, compiled.technique),
                    section="Compiling",
                    title=f"{title}: {compiled.technique}, {break_even(compiled)}",
                    summary=f"Cumulative seconds over images, {eager.technique} against {compiled.technique}.",
                    x_label="images made",
                    y_label=f"{unit(members)} spent, compiling included",
                    series=(_cumulative(eager, 0.0, images), _cumulative(compiled, compiling, images)),
                    scale="linear",
                )
            )
    return charts


def _eager(members: Sequence[Result], compiled: Result) -> Result | None:
    """The same configuration without compilation."""
    if compiled.compile == "none":
        return None
    plain = {"compile_scope": "unet", "compile_backend": "inductor", "id": None}
    eager = dict(compiled.benchmark.configuration, compile="none", **plain)
    return next((result for result in members if dict(result.benchmark.configuration, **plain) == eager), None)


def break_even(result: Result) -> str:
    """After how many images compiling pays, in words."""
    if result.amortise is None:
        return "break-even not computed (a single launch, a warm compile cache, or no eager configuration beside it)"
    estimate, low, high = result.amortise
    if estimate is None:
        return "no break-even shown"
    return f"pays after {estimate} images [{low}, {'never' if high is None else high}]"


def _cumulative(result: Result, start: float, images: Sequence[float]) -> Series:
    bounds = (result.seconds_per_image, *result.interval)
    points = [
        Point(count, *(start + count * seconds for seconds in bounds), result.facets, result.id) for count in images
    ]
    return Series(result.technique, result.technique, tuple(points))
