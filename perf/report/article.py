"""Charts of the article: every launch per GPU and batch, and bars over GPUs beside the published values."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from perf.report import tables
from perf.report.charts import Chart, Point, Series, by_technique, groups, newest_of, stamp, unit, valid
from perf.report.published import GPUS, published
from perf.report.results import Facets, Result
from perf.report.text import joined_name


def launch_charts(results: Sequence[Result]) -> list[Chart]:
    """One chart per GPU, batch and work, named like the article's files."""
    charts = []
    generations = [result for result in valid(results) if result.workload == "txt2img"]
    by_chart = groups(
        generations, lambda result: (result.session.machine, result.work, result.batch, result.session.rounds)
    )
    for (gpu, _, batch, rounds), members in by_chart.items():
        members, part = newest_of(members)
        first = members[0]
        several_stacks = len({(result.torch, result.session.identity) for result in members}) > 1
        charts.append(
            Chart(
                name=article_name(first),
                section="Launches",
                title=f"{gpu}{stamp(members)}: {first.work_name}, n_samples {batch}, n_iter {rounds or 'unknown'}{part}",
                summary=f"Seconds per image of every launch of {len(members)} configurations on {gpu} at batch {batch}.",
                x_label="launch",
                y_label=f"{unit(members)} per image",
                series=tuple(_launches(result, several_stacks) for result in members),
                scale="linear",
            )
        )
    return charts


def article_name(result: Result) -> str:
    """`original_vs_optimized_{GPU}_n_samples_{n}_n_iter_{k}_{sd1|sd2}`, followed by options that the article did not vary."""
    session, options = result.session, result.work_name.partition(", ")[2]
    counts = f"n_samples_{result.batch}", f"n_iter_{session.rounds}"
    synthetic = "synthetic" if session.synthetic else ""
    return joined_name("original_vs_optimized", session.gpu, *counts, result.model, options, synthetic)


def _launches(result: Result, with_torch: bool) -> Series:
    points = []
    for number, rounds in enumerate(result.benchmark.launches, 1):
        if rounds:
            values = (seconds / result.batch for seconds in (statistics.median(rounds), min(rounds), max(rounds)))
            points.append(Point(number, *values, result.facets, f"{result.id}, launch {number}, {len(rounds)} rounds"))
    name = f"{result.technique} (torch {result.torch})" if with_torch else result.technique
    return Series(name, result.technique, tuple(points), band=result.interval)


def gpu_charts(results: Sequence[Result]) -> list[Chart]:
    """Bars over GPUs, one chart per work and batch, with the published values of the same work."""
    charts = []
    own = groups(valid(results), lambda result: (result.work, result.batch))
    models = {result.model for result in results}
    article_works = {
        (cell.work, cell.batch): cell.model
        for cell in published()
        if cell.seconds_per_image is not None and cell.model in models
    }
    for key in dict.fromkeys([*own, *article_works]):
        (members, part), (work, batch) = newest_of(own.get(key, [])), key
        series = _published_bars(article_works[key], batch) if key in article_works else []
        series += _own_bars(members)
        if sum(len(bars.points) for bars in series) < 2:  # a single bar compares nothing
            continue
        name = members[0].work_name if members else str(work[0])
        charts.append(
            Chart(
                name=joined_name(f"gpus_{name}_batch_{batch}"),
                section="GPUs",
                title=f"{name}, batch {batch}: time per image by GPU{part}{_synthetic(members)}{stamp(members)}",
                summary=f"Seconds per image of {len(series)} configurations by GPU at batch {batch}.",
                x_label="GPU",
                y_label=f"{unit(members)} per image",
                series=tuple(series),
                places=_places(series),
            )
        )
    return charts


def ratio_charts(results: Sequence[Result]) -> list[Chart]:
    """Speed-ups over the original code by GPU, published beside own ones of any model, one chart per batch."""
    ratios = tables.ratios(results)
    charts = []
    for batch in dict.fromkeys(ratio.batch for ratio in ratios if ratio.result):
        printed = [ratio for ratio in ratios if ratio.batch == batch and ratio.result is None]
        own, part = newest_of([ratio for ratio in ratios if ratio.batch == batch and ratio.result])
        members = [*printed, *own]
        bars = groups(members, lambda ratio: (ratio.technique, ratio.result is None))
        charts.append(
            Chart(
                name=f"ratios_batch_{batch}",
                section="GPUs",
                title=f"Batch {batch}: speed-up over the original code{part}{stamp([ratio.result for ratio in own])}",
                summary=f"Speed-up of {len(bars)} configurations over the original code by GPU at batch {batch}.",
                x_label="GPU",
                y_label="times as fast as the original code",
                series=tuple(
                    Series(
                        f"{name} (published)" if printed else name,
                        name,
                        tuple(map(_ratio, group)),
                        "bar",
                        faint=printed,
                    )
                    for (name, printed), group in bars.items()
                ),
                levels=(("", 1.0),),
            )
        )
    return charts


def _ratio(ratio: tables.Ratio) -> Point:
    facets = ratio.result.facets if ratio.result else None
    note = (
        f"{ratio.result.id}, {ratio.result.session.name}"
        if ratio.result
        else "published, computed from printed seconds"
    )
    return Point(ratio.column, ratio.estimate, ratio.low, ratio.high, facets, note)


def _synthetic(results: Sequence[Result]) -> str:
    synthetic = {bool(result.session.synthetic) for result in results}
    return " (partly synthetic)" if len(synthetic) == 2 else " (synthetic)" if True in synthetic else ""


def _published_bars(model: str, batch: int) -> list[Series]:
    points: dict[str, list[Point]] = {}
    cells = [cell for cell in published() if (cell.model, cell.batch) == (model, batch) and cell.seconds_per_image]
    for cell in sorted(cells, key=lambda cell: GPUS.index(cell.gpu)):
        attention = "xformers" if "xformers" in cell.technique else cell.technique.partition("-")[0]
        facets = Facets(model, cell.gpu, str(batch), cell.torch, attention)
        note = f"published, torch {cell.torch}; no interval printed"
        point = Point(f"{cell.gpu} (published)", cell.seconds_per_image, facets=facets, note=note)
        points.setdefault(cell.technique, []).append(point)
    return [Series(f"{name} (published)", name, tuple(bars), "bar", faint=True) for name, bars in points.items()]


def _own_bars(members: Sequence[Result]) -> tuple[Series, ...]:
    machines = groups(members, lambda result: result.session.machine)
    several = {machine for machine, results in machines.items() if len({result.torch for result in results}) > 1}

    def bar(result: Result) -> Point:
        machine = result.session.machine
        place = f"{machine}, torch {result.torch.partition('+')[0]}" if machine in several else machine
        note = f"{result.id}, {result.session.name}, {result.interval_name}; torch {result.torch}"
        return Point(place, result.seconds_per_image, *result.interval, result.facets, note)

    return by_technique(members, bar, "bar")


def _places(series: Sequence[Series]) -> tuple[str, ...]:
    """Published GPUs in the article's order, each followed by own measurements on that GPU, then the other devices."""
    gpus = {str(point.x): point.facets.gpu for bars in series for point in bars.points}
    order = {gpu: number for number, gpu in enumerate(GPUS)}
    return tuple(sorted(gpus, key=lambda place: (order.get(gpus[place], len(GPUS)), "(published)" not in place, place)))
