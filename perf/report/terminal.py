"""The summary after `pytest perf`: one table, ranked, and the lines that say how far to trust it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from perf import record
from perf.baselines import Judgement
from perf.session import Session
from perf.verdicts import Decision


def write(
    reporter,
    session: Session,
    infos: dict[str, dict],
    decisions: dict[str, Decision],
    judgement: Judgement | None,
    partial: str | None,
) -> None:
    """Print the summary of a session to pytest's terminal."""
    reporter.section("perf", sep="-")
    terminal = reporter._tw
    console = Console(
        file=terminal._file,
        width=max(terminal.fullwidth, 80),
        force_terminal=terminal.hasmarkup,
        no_color=not terminal.hasmarkup,
        highlight=False,
    )
    if infos:
        console.print(table(session, infos))
    for line in lines(session, infos, decisions, judgement, partial):
        console.print(line, markup=False, soft_wrap=True)


def ranked(infos: dict[str, dict]) -> list[str]:
    """Ids from the fastest image to the slowest."""
    return sorted(infos, key=lambda id: infos[id]["seconds_per_image"])


def table(session: Session, infos: dict[str, dict]) -> Table:
    """A row a configuration, the fastest first."""
    what = "CPU ms" if session.settings.clock == "cpu" else "ms"
    result = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    result.add_column("configuration", overflow="fold")
    for name in (f"{what}/image [95 %]", "speed-up", "MiB", "of peak", "dB"):
        result.add_column(name, justify="right")
    if any(info["joules_per_image"] for info in infos.values()):
        result.add_column("J/image", justify="right")
    for id in ranked(infos):
        result.add_row(*_row(session, id, infos[id], len(result.columns)))
    return result


def _row(session: Session, id: str, info: dict, columns: int) -> list[str]:
    batch = info["configuration"]["batch"]
    bounds = record.interval(session.measurements.by_name[id])
    spread = f" [{_ms(bounds[0] / batch)}, {_ms(bounds[1] / batch)}]" if bounds else ""
    speedup, peak = info["speedup"], info["peak_bytes"]
    bytes_held = peak["allocated"] or peak["rss"]
    cells = [
        id,
        _ms(info["seconds_per_image"]) + spread,
        f"{speedup['estimate']:.2f}x" if speedup else "",
        f"{bytes_held / 2**20:.0f}" if bytes_held else "",
        f"{100 * info['flops_fraction']:.1f} %" if info["flops_fraction"] else "",
        "" if info["image"]["psnr_db"] is None else f"{info['image']['psnr_db']:.0f}",
    ]
    if columns > len(cells):
        cells.append(f"{info['joules_per_image']:.1f}" if info["joules_per_image"] else "")
    return cells


def _ms(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def lines(
    session: Session,
    infos: dict[str, dict],
    decisions: dict[str, Decision],
    judgement: Judgement | None,
    partial: str | None,
) -> list[str]:
    """What must be known beside the table: how it was measured, what was decided, and which is the fastest."""
    measurements = session.measurements
    found = [_how(session)]
    for id, info in infos.items():
        if info["compile"]:
            found.append(_compiling(id, info))
    for id, reason in session.unchecked.items():
        found.append(f"{id}: its picture was not checked: {reason}")
    thrown, total = measurements.counts()
    if thrown:
        found.append(f"{thrown} of {total} rounds were invalid and measured again")
    if measurements.invalid():
        found.append(f"INVALID session: {measurements.invalid()}: no baseline, no verdict")
    if partial:
        found.append(f"partial run ({partial}): never a baseline by itself")
    for id, decision in decisions.items():
        found.append(f"{id}: {decision}")
    if decisions:
        margins = [decision.margin for decision in decisions.values() if decision.margin]
        expected = f", margin {100 * max(margins):.1f} %" if margins else ""
        found.append(
            f"{len(decisions)} comparison(s){expected}; under no change at most 1 in 40 of them is wrong each way"
        )
    if judgement:
        found += [f"{name}: {', '.join(ids)}" for name, ids in _absent(judgement) if ids]
    return found + _fastest(infos, session)


def _absent(judgement: Judgement):
    return ("not measured, though the baseline has it", judgement.missing), ("new, without a baseline", judgement.new)


def _how(session: Session) -> str:
    settings = session.settings
    clock = "CPU time" if settings.clock == "cpu" else "wall time"
    threads = f" of {settings.threads} thread(s)" if settings.threads else ""
    how = "fresh processes in turns" if settings.isolated else "one process: launch variance is not in the interval"
    drift = session.measurements.drift()
    moved = "" if drift is None else f", anchor moved {100 * drift:.1f} %"
    return (
        f"{clock}{threads}, {settings.launches} launches of {settings.rounds} rounds, {how}{moved}; "
        f"{session.seconds:.0f} s in all"
    )


def _compiling(id: str, info: dict) -> str:
    first, counts, pays = info["first_call_seconds"], info["compile"], info["images_to_amortise"]
    words = f"{id}: first call {first['cold']:.1f} s cold"
    if first["warm"] is not None:
        words += f", {first['warm']:.1f} s with a warm compile cache"
    words += f"; {counts['graph_breaks']} graph breaks, {counts['recompiles']} recompiles"
    if pays is None:
        return words
    if pays["estimate"] is None:
        return words + "; never pays here"
    return words + f"; pays after {pays['estimate']} images [{pays['low']}, {pays['high'] or 'never'}]"


def _fastest(infos: dict[str, dict], session: Session) -> list[str]:
    if not infos:
        return []
    best = ranked(infos)[0]
    speedup = infos[best]["speedup"]
    words = f"fastest here: {best}, {_ms(infos[best]['seconds_per_image'])} ms an image"
    if speedup:
        words += f", {speedup['estimate']:.2f}x {speedup['against']} [{speedup['low']:.2f}, {speedup['high']:.2f}]"
    return [words]
