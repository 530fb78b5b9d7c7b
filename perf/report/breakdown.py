"""Where the time goes and what it costs: the ladder, stages, kernels, energy, the roofline and what compiling takes."""

from __future__ import annotations

from collections.abc import Sequence

from perf.configurations import SETS
from perf.report.charts import Chart, Point, Series, groups, unit, valid
from perf.report.palette import KERNEL_CLASSES
from perf.report.results import Result
from perf.report.text import file_name

LADDER = [one.id.removeprefix("sd2-").removesuffix("-b1") for one in SETS["ladder"]]
MOST_BARS = 24


def _title(members: Sequence[Result]) -> str:
    first = members[0]
    return f"{first.session.machine}, torch {first.session.torch}: {first.work_name}, batch {first.batch}"


def _by_session(results: Sequence[Result]):
    """(members, stem of a file name) of each session, work and batch with at least one valid result."""
    found = groups(valid(results), lambda one: (one.session.identity, one.session.name, one.work, one.batch))
    for members in found.values():
        first = members[0]
        parts = [first.session.machine, first.session.torch, first.work_name, f"batch {first.batch}"]
        yield members, file_name("_".join(parts).replace(", ", "_").replace(" ", "_"))


def _by_model(results: Sequence[Result]):
    """(members, title, stem of a file name) of each session and model, in portions that stay readable."""
    for members in groups(valid(results), lambda one: (one.session.identity, one.session.name, one.model)).values():
        first = members[0]
        title = f"{first.session.machine}, torch {first.session.torch}: {first.model}"
        stem = file_name(title.replace(", ", "_").replace(": ", "_").replace(" ", "_"))
        for begin in range(0, len(members), MOST_BARS):
            number = f" ({begin // MOST_BARS + 1})" if len(members) > MOST_BARS else ""
            yield members[begin : begin + MOST_BARS], title + number, stem + number.replace(" (", "_").rstrip(")")


def _short(one: Result) -> str:
    """The id without the model, for a chart that has only one."""
    return one.id.removeprefix(f"{one.model}-")


def ladder_charts(results: Sequence[Result]) -> list[Chart]:
    """A waterfall of each session: the original first, each rung where it lies in the ladder, then from slow to fast."""
    charts = []
    for members, stem in _by_session(results):
        original = [one for one in members if one.technique.startswith("original")]
        if len(members) < 2 or not original:
            continue
        rungs = _rungs(members)
        points, before = [], None
        for one in rungs:
            low, high = one.interval
            now = one.seconds_per_image
            start = before.seconds_per_image if before else 0.0
            change = f"{100 * (1 - now / start):+.1f} % less" if before else "where it starts"
            note = f"{one.seconds_per_image:.4g} s, {change}, {one.interval_name}"
            points.append(Series(one.technique, one.technique, (_floating(one, start, low, high, note),), "bar"))
            before = one
        charts.append(
            Chart(
                name=f"ladder_{stem}",
                section="Ladder",
                title=f"{_title(members)}: from the original on",
                summary=f"Waterfall of {len(rungs)} configurations from {rungs[0].id} to {rungs[-1].id}.",
                x_label="configuration",
                y_label=f"{unit(members)} per image",
                series=tuple(points),
            )
        )
    return charts


def _floating(one: Result, start: float, low: float, high: float, note: str) -> Point:
    return Point(one.technique, one.seconds_per_image, low, high, one.facets, note, base=start)


def _rungs(members: Sequence[Result]) -> list[Result]:
    """The ladder's order for its members alone; else the slowest first, for then each step is what the next one saves."""
    if all(one.technique in LADDER for one in members):
        return sorted(members, key=lambda one: LADDER.index(one.technique))
    rest = sorted(members, key=lambda one: -one.seconds_per_image)
    return sorted(rest, key=lambda one: one.technique != "original")


def stage_charts(results: Sequence[Result]) -> list[Chart]:
    """Stacked seconds of text, UNet, VAE and the rest."""
    charts = []
    for members, title, stem in _by_model([one for one in results if one.stages]):
        series = []
        for stage in ("text", "unet", "vae", "other"):
            points = []
            for one in members:
                whole = one.seconds_per_image
                parts = {name: value / one.batch for name, value in one.stages.items()}
                # Stages are medians by themselves, on a GPU of the device's clock: their sum may pass the whole a little.
                value = max(0.0, whole - sum(parts.values())) if stage == "other" else parts.get(stage, 0.0)
                low, high = one.interval if stage == "other" else (None, None)
                note = f"{stage} {value:.4g} s of {whole:.4g} s"
                points.append(Point(_short(one), value, low, high, one.facets, note))
            series.append(Series(stage, stage, tuple(points), "bar"))
        charts.append(
            Chart(
                name=f"stages_{stem}",
                section="Stages",
                title=f"{title}: by stage",
                summary=f"Seconds per image by stage of {len(members)} configurations.",
                x_label="configuration",
                y_label=f"{unit(members)} per image",
                series=tuple(series),
                stacked=True,
            )
        )
    return charts


def kernel_charts(results: Sequence[Result]) -> list[Chart]:
    """Stacked seconds of a traced round by class of kernel."""
    charts = []
    for members, stem in _by_session(results):
        known = [one for one in members if one.trace][:MOST_BARS]
        if not known:
            continue
        classes = [name for name in KERNEL_CLASSES if any(name in one.trace for one in known)]
        series = [
            Series(
                name,
                name,
                tuple(
                    Point(one.technique, one.trace.get(name, 0.0), facets=one.facets, note=f"{one.id}, {name}")
                    for one in known
                ),
                "bar",
            )
            for name in classes
        ]
        charts.append(
            Chart(
                name=f"kernels_{stem}",
                section="Kernels",
                title=f"{_title(known)}: one round by class of kernel",
                summary=f"Seconds of one traced round by class of kernel, {len(known)} configurations.",
                x_label="configuration",
                y_label="s per round (wall time, with the profiler on)",
                series=tuple(series),
                stacked=True,
            )
        )
    return charts


def energy_charts(results: Sequence[Result]) -> list[Chart]:
    """Joules per image."""
    charts = []
    known = [one for one in results if one.benchmark.joules_per_image is not None]
    for members, title, stem in _by_model(known):
        series = []
        for one in members:
            low, high = one.joule_range or (None, None)
            point = Point(_short(one), one.benchmark.joules_per_image, low, high, one.facets, one.id)
            series.append(Series(_short(one), one.technique, (point,), "bar"))
        charts.append(
            Chart(
                name=f"energy_{stem}",
                section="Energy",
                title=f"{title}: energy of an image",
                summary=f"Joules per image of {len(members)} configurations.",
                x_label="configuration",
                y_label="J per image",
                series=tuple(series),
            )
        )
    return charts


def roofline_charts(results: Sequence[Result]) -> list[Chart]:
    """FLOP/s reached over the work of a round, under the measured ceilings; one chart a machine."""
    charts = []
    known = [one for one in valid(results) if one.flops and one.session.ceilings]
    for members in groups(known, lambda one: (one.session.identity,)).values():
        first = members[0]
        series = []
        for technique, ones in groups(members, lambda one: one.technique).items():
            points = []
            for one in sorted(ones, key=lambda one: one.flops):
                low, high = one.interval
                per_image = one.flops / one.batch
                rate = per_image / one.seconds_per_image / 1e12
                note = (
                    one.id
                    if one.flops_fraction is None
                    else f"{one.id}: {100 * one.flops_fraction:.1f} % of its ceiling"
                )
                points.append(
                    Point(one.flops / 1e12, rate, per_image / high / 1e12, per_image / low / 1e12, one.facets, note)
                )
            series.append(Series(technique, technique, tuple(points), "markers"))
        machine = f"{first.session.machine}, torch {first.session.torch}"
        charts.append(
            Chart(
                name=file_name(f"roofline_{machine}".replace(", ", "_").replace(" ", "_")),
                section="Roofline",
                title=f"{machine}: under the roof",
                summary=f"Achieved TFLOP/s of {len(members)} results under {len(first.session.ceilings)} measured ceilings.",
                x_label="work of a round, TFLOP",
                y_label="reached, TFLOP/s",
                series=tuple(series),
                scale="log",
                y_log=True,
                zero=False,
                levels=tuple((f"measured {name}", rate / 1e12) for name, rate in first.session.ceilings.items()),
            )
        )
    return charts


def compile_charts(results: Sequence[Result]) -> list[Chart]:
    """Seconds spent after n images, eager against compiled, where a session has both."""
    charts = []
    for members, stem in _by_session(results):
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
                    name=file_name(f"compiling_{stem}_{compiled.technique}"),
                    section="Compiling",
                    title=f"{_title(members)}: {compiled.technique}, {_pays(compiled)}",
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
