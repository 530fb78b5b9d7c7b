"""The roofline (Williams, Waterman and Patterson 2009): achieved FLOP/s under the device's measured peaks."""

from __future__ import annotations

from collections.abc import Sequence

from perf.report.charts import Chart, Point, Series, by_technique, groups, stamp, valid
from perf.report.palette import ROOFS
from perf.report.results import Result, SavedSession
from perf.report.text import counted, joined_name

TERA = 1e12


def roofline_charts(results: Sequence[Result]) -> list[Chart]:
    """Achieved FLOP/s over FLOPs per byte under both measured roofs, one chart per machine.

    Runs without minimum bytes have no place on the x axis, and are left out.
    """
    charts = []
    known = [result for result in valid(results) if result.flops and result.floor_bytes and result.session.ceilings]
    for members in groups(known, lambda result: result.session.identity).values():
        session = members[0].session
        machine = f"{session.machine}, torch {session.torch}"
        series = by_technique(sorted(members, key=_intensity), _point, "markers")
        charts.append(
            Chart(
                name=joined_name("roofline", machine),
                section="Roofline",
                title=f"{machine}{stamp(members)}: roofline",
                summary=f"Achieved TFLOP/s of {len(members)} results over FLOPs per byte, under {_roof_names(session)}.",
                x_label="FLOPs per minimum byte of a round",
                y_label="achieved TFLOP/s",
                series=(*series, *_roofs(session, list(map(_intensity, members)))),
                scale="log",
                y_log=True,
                zero=False,
            )
        )
    return charts


def _intensity(result: Result) -> float:
    return result.flops / result.floor_bytes


def _point(result: Result) -> Point:
    flops = result.flops / result.images / TERA
    low, high = result.interval
    note = f"{result.id}: {_intensity(result):.3g} FLOP/byte, {result.interval_name}"
    if result.flops_fraction is not None:
        note += f", {100 * result.flops_fraction:.1f} % of peak FLOP/s"
    return Point(_intensity(result), flops / result.seconds_per_image, flops / high, flops / low, result.facets, note)


def _roof_names(session: SavedSession) -> str:
    peaks = f"{counted(len(session.ceilings), 'measured peak')} of matrix products"
    return f"{peaks} and that of copies" if session.copy_bytes_per_second else peaks


def _roofs(session: SavedSession, intensities: Sequence[float]) -> list[Series]:
    """Per dtype the line of copies up to the ridge, and of matrix products beyond it.

    Without a measured copy (older runs) the line of matrix products alone, over the whole width.
    """
    bandwidth, roofs = session.copy_bytes_per_second, []
    for look, (dtype, peak) in zip(ROOFS, session.ceilings.items()):
        ridge = [peak / bandwidth] if bandwidth else []
        low, high = min([*intensities, *ridge]) / 4, max([*intensities, *ridge]) * 2
        heights = [(x, min(peak, x * bandwidth) if bandwidth else peak) for x in (low, *ridge, high)]
        name = f"measured {dtype}, {peak / TERA:.3g} TFLOP/s"
        name += f"; copy, {bandwidth / 1e9:.4g} GB/s" if bandwidth else ""
        points = tuple(Point(x, y / TERA, note="measured once, as a maximum: no interval") for x, y in heights)
        roofs.append(Series(name, look, points, "curve"))
    return roofs
