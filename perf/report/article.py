"""The article's plots: every launch of each GPU and batch, and bars per batch over GPUs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from perf.report.charts import Chart, Point, Series, groups, measured, synthetic, unit, valid
from perf.report.published import GPUS, published
from perf.report.results import Facets, Result
from perf.report.text import words_name


def launch_charts(results: Sequence[Result]) -> list[Chart]:
    """One chart a GPU, batch and work, named as the article named its files."""
    charts = []
    wanted = [one for one in valid(results) if one.workload == "txt2img"]
    for (gpu, _, batch, rounds), members in groups(
        wanted, lambda one: (one.session.machine, one.work, one.batch, one.session.rounds)
    ).items():
        first = members[0]
        # Two stacks on one GPU stand in one chart, and their names tell them apart.
        stacks = {(one.torch, one.session.identity) for one in members}
        series = [_launches(one, len(stacks) > 1) for one in members]
        charts.append(
            Chart(
                name=article_name(first),
                section="Launches",
                title=f"{gpu}: {first.work_name}, n_samples {batch}, n_iter {rounds or 'unknown'}",
                summary=f"Seconds per image of every launch of {len(members)} configurations on {gpu} at batch {batch}.",
                x_label="launch",
                y_label=f"{unit(members)} per image",
                series=tuple(series),
                scale="linear",
            )
        )
    return charts


def article_name(result: Result) -> str:
    """`original_vs_optimized_{GPU}_n_samples_{n}_n_iter_{k}_{sd1|sd2}`; what the article did not vary stands behind it."""
    work = result.work_name.partition(", ")[2]
    parts = [
        "original_vs_optimized",
        result.session.gpu,
        f"n_samples_{result.batch}",
        f"n_iter_{result.session.rounds}",
    ]
    parts += [result.model, work, "synthetic" if result.session.synthetic else ""]
    return words_name(*parts)


def _launches(result: Result, with_stack: bool) -> Series:
    points = []
    for number, rounds in enumerate(result.benchmark.launches, 1):
        if rounds:
            low, middle, high = min(rounds), statistics.median(rounds), max(rounds)
            points.append(
                Point(
                    number,
                    middle / result.batch,
                    low / result.batch,
                    high / result.batch,
                    result.facets,
                    f"{result.id}, launch {number}, {len(rounds)} rounds",
                )
            )
    name = f"{result.technique} (torch {result.torch})" if with_stack else result.technique
    return Series(name, result.technique, tuple(points), band=result.interval)


def gpu_charts(results: Sequence[Result]) -> list[Chart]:
    """Bars over GPUs, one chart a work and batch, with the published figures where the work is theirs."""
    charts = []
    members_of = groups(valid(results), lambda one: (one.work, one.batch))
    own_models = {one.model for one in results}
    published_works = {
        ((cell.model, "txt2img", 50, "plms", (0, 0)), cell.batch): cell.model
        for cell in published()
        if cell.seconds_per_image is not None and cell.model in own_models
    }
    for key in dict.fromkeys([*members_of, *published_works]):
        members, (work, batch) = members_of.get(key, []), key
        series = _published_bars(published_works[key], batch) if key in published_works else []
        series += _own_bars(members)
        if sum(len(one.points) for one in series) < 2:  # one bar compares nothing
            continue
        name = members[0].work_name if members else str(work[0])
        charts.append(
            Chart(
                name=words_name(f"gpus_{name}_batch_{batch}"),
                section="GPUs",
                title=f"{name}, batch {batch}: time of an image by GPU{synthetic(members)}",
                summary=f"Seconds per image of {len(series)} configurations by GPU at batch {batch}.",
                x_label="GPU",
                y_label=f"{unit(members)} per image",
                series=tuple(series),
                places=_places(series),
            )
        )
    return charts


def _published_bars(model: str, batch: int) -> list[Series]:
    found: dict[str, list[Point]] = {}
    cells = [cell for cell in published() if (cell.model, cell.batch) == (model, batch)]
    for cell in sorted(cells, key=lambda one: GPUS.index(one.gpu)):
        if cell.seconds_per_image is None:
            continue
        attention = "xformers" if "xformers" in cell.technique else cell.technique.partition("-")[0]
        facets = Facets(model, cell.gpu, str(batch), cell.torch, attention)
        note = f"published, torch {cell.torch}; no interval printed"
        found.setdefault(cell.technique, []).append(
            Point(f"{cell.gpu} (published)", cell.seconds_per_image, facets=facets, note=note)
        )
    return [
        Series(f"{technique} (published)", technique, tuple(points), "bar", faint=True)
        for technique, points in found.items()
    ]


def _own_bars(members: Sequence[Result]) -> list[Series]:
    stacks = groups(members, lambda one: one.session.machine)
    several = {machine for machine, ones in stacks.items() if len({one.torch for one in ones}) > 1}

    def place(one: Result) -> str:
        machine = one.session.machine
        return f"{machine}, torch {one.torch.partition('+')[0]}" if machine in several else machine

    return [
        Series(technique, technique, tuple(measured(one, place(one), f"torch {one.torch}") for one in ones), "bar")
        for technique, ones in groups(members, lambda one: one.technique).items()
    ]


def _places(series: Sequence[Series]) -> tuple[str, ...]:
    """Published GPUs in the article's order, each with the reader's own of that name beside it, then the others."""
    found = {str(point.x): point.facets.gpu for one in series for point in one.points}
    order = {gpu: number for number, gpu in enumerate(GPUS)}
    return tuple(
        sorted(found, key=lambda place: (order.get(found[place], len(GPUS)), "(published)" not in place, place))
    )
