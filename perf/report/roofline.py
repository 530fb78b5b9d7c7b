"""The roofline (Williams, Waterman and Patterson 2009): what is reached, under what the device could do for each byte."""

from __future__ import annotations

from collections.abc import Sequence

from perf.report.charts import Chart, Point, Series, groups, valid
from perf.report.palette import ROOFS
from perf.report.results import Result, Session
from perf.report.text import words_name

TERA = 1e12


def roofline_charts(results: Sequence[Result]) -> list[Chart]:
    """FLOP/s reached over FLOPs per byte, under both measured roofs; one chart a machine.

    Runs from before bytes were counted have no place on the x axis, and are left out.
    """
    charts = []
    known = [one for one in valid(results) if one.flops and one.floor_bytes and one.session.ceilings]
    for members in groups(known, lambda one: one.session.identity).values():
        session = members[0].session
        machine = f"{session.machine}, torch {session.torch}"
        points = [
            Series(technique, technique, tuple(map(_point, sorted(ones, key=_intensity))), "markers")
            for technique, ones in groups(members, lambda one: one.technique).items()
        ]
        charts.append(
            Chart(
                name=words_name("roofline", machine),
                section="Roofline",
                title=f"{machine}: under the roof",
                summary=f"Achieved TFLOP/s of {len(members)} results over FLOPs per byte, under {_roof_names(session)}.",
                x_label="FLOPs per byte that a round at least moves",
                y_label="reached, TFLOP/s",
                series=(*points, *_roofs(session, list(map(_intensity, members)))),
                scale="log",
                y_log=True,
                zero=False,
            )
        )
    return charts


def _intensity(one: Result) -> float:
    return one.flops / one.floor_bytes


def _point(one: Result) -> Point:
    per_image = one.flops / one.batch / TERA
    low, high = one.interval
    note = f"{one.id}: {_intensity(one):.3g} FLOP/byte, {one.interval_name}"
    if one.flops_fraction is not None:
        note += f", {100 * one.flops_fraction:.1f} % of its ceiling"
    return Point(
        _intensity(one), per_image / one.seconds_per_image, per_image / high, per_image / low, one.facets, note
    )


def _roof_names(session: Session) -> str:
    matrices = f"{len(session.ceilings)} measured ceiling{'s' if len(session.ceilings) > 1 else ''} of matrix products"
    return f"{matrices} and that of copies" if session.copy_bytes_per_second else matrices


def _roofs(session: Session, intensities: Sequence[float]) -> list[Series]:
    """For each dtype the line of a copy up to the ridge, and from there on that of matrix products.

    Where the copy was not measured (older runs) the second alone, over the whole width.
    """
    bandwidth, roofs = session.copy_bytes_per_second, []
    for look, (dtype, ceiling) in zip(ROOFS, session.ceilings.items()):
        ridge = [ceiling / bandwidth] if bandwidth else []
        low, high = min([*intensities, *ridge]) / 4, max([*intensities, *ridge]) * 2
        heights = [(x, min(ceiling, x * bandwidth) if bandwidth else ceiling) for x in (low, *ridge, high)]
        name = f"measured {dtype}, {ceiling / TERA:.3g} TFLOP/s"
        name += f"; copy, {bandwidth / 1e9:.4g} GB/s" if bandwidth else ""
        note = "measured once, as a maximum: no interval"
        roofs.append(Series(name, look, tuple(Point(x, y / TERA, note=note) for x, y in heights), "curve"))
    return roofs
