"""The summary after `pytest perf`: one table, ranked, and the lines that say how far to trust it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from perf.analysis.ranking import fastest_line, sort_by_seconds
from perf.analysis.statistics import Interval
from perf.analysis.verdicts import Decision, Verdict
from perf.configurations.configuration import is_approximate
from perf.report.text import interval_seconds, size
from perf.runs.baselines import Judgement
from perf.session import record
from perf.session.run import Session

STYLES = {"SLOWER": "bold red", "INVALID": "bold red", "FASTER": "green", "SAME": "", "INCONCLUSIVE": "yellow"}
WIDE = 150  # columns from which on a configuration has one line; under it, three that fit 80


def write(
    reporter,
    session: Session,
    infos: dict[str, dict],
    decisions: dict[str, Decision],
    judgement: Judgement | None,
    partial: str | None,
) -> None:
    """Print the summary of a session to pytest's terminal: with colour where it has any, else plain."""
    reporter.section("perf", sep="-")
    terminal = reporter._tw
    console = Console(
        file=terminal._file,
        width=max(terminal.fullwidth, 80),
        force_terminal=terminal.hasmarkup,
        no_color=not terminal.hasmarkup,
        highlight=False,
    )
    if infos or session_failures(session):
        print_table(console, session, infos, decisions)
    for line in lines(session, infos, decisions, judgement, partial):
        console.print(line, markup=False, soft_wrap=True)


def ranked(infos: dict[str, dict]) -> list[str]:
    """Ids from the fastest image to the slowest."""
    return sort_by_seconds(infos, lambda id: infos[id]["seconds_per_image"])


def session_failures(session: Session) -> dict[str, str]:
    """Why configurations of the working tree have no time, by id; but for what cannot run here, which is skipped."""
    failed = {}
    for slot in session.plan.slots:
        failure = session.measurements.by_name[slot.name].failure
        if slot.variant is None and failure and failure[0] != "unavailable":
            failed[slot.configuration.id] = f"{failure[0]}: {failure[1]}"
    return failed


def print_table(console: Console, session: Session, infos: dict[str, dict], decisions: dict[str, Decision]) -> None:
    """Every configuration, the fastest first, and those that failed last."""
    rows = [(id, cells(session, id, infos[id], decisions.get(id)), decisions.get(id)) for id in ranked(infos)]
    if console.width >= WIDE:
        console.print(_wide(session, rows))
    else:
        for line in _narrow(session, rows):
            console.print(line, soft_wrap=True)
    for id, reason in session_failures(session).items():
        console.print(Text.assemble((f"{id}  ", ""), ("INVALID", STYLES["INVALID"]), f" ({reason})"), soft_wrap=True)


def cells(session: Session, id: str, info: dict, decision: Decision | None) -> dict[str, str]:
    """What is known of a configuration, by the names of columns; what is not known is left out."""
    batch, seconds = info["configuration"]["batch"], info["seconds_per_image"]
    bounds = record.interval(session.measurements.by_name[id])
    found = {"time": interval_seconds(seconds, *(bound / batch for bound in bounds or ()))}
    found["images/s"] = f"{1 / seconds:.3g}"
    speedup, peak = info["speedup"], info["peak_bytes"]
    if speedup:
        found["speed-up"] = f"{speedup['estimate']:.2f}x [{speedup['low']:.2f}, {speedup['high']:.2f}]"
    elif _is_reference(info):
        found["speed-up"] = "reference"
    held = peak["allocated"] or peak["rss"]
    if held:
        found["peak"] = size(held)
    if info["joules_per_image"]:
        found["energy"] = f"{info['joules_per_image']:.1f} J/image"
    if info["flops_fraction"]:
        found["of peak FLOP/s"] = f"{100 * info['flops_fraction']:.1f} %"
    if info["image"]["psnr_db"] is not None:
        approximate = ", approximate" if info["image"]["verdict"] == "approximate" else ""
        found["picture"] = f"{info['image']['psnr_db']:.0f} dB{approximate}"
    if decision:
        found["verdict"], found["reason"] = decision.verdict.value, str(decision).removeprefix(decision.verdict.value)
    return found


def _is_reference(info: dict) -> bool:
    """Whether this is the configuration that speed-ups refer to."""
    chosen = info["configuration"]
    wanted = {"engine": "sd", "attention": "original", "compile": "none", "optimise": ""}
    return {name: chosen[name] for name in wanted} == wanted


def _unit(session: Session) -> str:
    return "CPU time/image [95 %]" if session.settings.clock == "cpu" else "time/image [95 %]"


def _wide(session: Session, rows) -> Table:
    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    result.add_column("configuration", overflow="fold")
    there = ("time", "images/s", "speed-up", "peak", "energy", "of peak FLOP/s", "picture", "verdict", "reason")
    columns = [name for name in there if any(name in known for _, known, _ in rows)]
    for name in columns:
        left = name in ("verdict", "reason")
        result.add_column(_unit(session) if name == "time" else name, justify="left" if left else "right")
    for id, known, decision in rows:
        style = STYLES[decision.verdict.value] if decision else ""
        result.add_row(Text(id), *(Text(known.get(name, ""), style if name == "verdict" else "") for name in columns))
    return result


def _narrow(session: Session, rows) -> list[Text]:
    """Two lines a configuration, and a third where there is more to say, each within 80 columns."""
    found = [Text(f"   {_unit(session):<30} {'images/s':>8}   {'speed-up':<21} verdict".rstrip(), "bold")]
    for rank, (id, known, decision) in enumerate(rows, 1):
        found.append(Text(f"{rank:>2} {id}", "bold"))
        numbers = f"   {known['time']:<30} {known['images/s']:>8}   {known.get('speed-up', ''):<21} "
        style = STYLES[decision.verdict.value] if decision else ""
        found.append(Text.assemble(numbers, (known.get("verdict", ""), style)))
        words = {"peak": "{} peak", "energy": "{}", "of peak FLOP/s": "{} of peak FLOP/s", "picture": "picture {}"}
        more = ", ".join(text.format(known[name]) for name, text in words.items() if name in known)
        if more:
            found.append(Text(f"   {more}", "dim"))
        if decision and decision.verdict is not Verdict.SAME:
            found.append(Text(f"  {known['reason']}", "dim"))
    for line in found:
        line.rstrip()
    return found


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
        launches = (len(one.launches) for one in measurements.by_name.values())
        wrong = 25 if max(launches) > session.plan.launches else 40  # the undecided ones were looked at twice
        found.append(
            f"{len(decisions)} comparison(s){expected}; under no change at most 1 in {wrong} of them is wrong each way"
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
        words += f", which is a process's first picture after {info['first_picture_seconds']['warm']:.1f} s"
    words += f"; {counts['graph_breaks']} graph breaks, {counts['recompiles']} recompiles"
    if pays is None:
        return words
    if pays["estimate"] is None:
        return words + "; never pays here"
    return words + f"; pays after {pays['estimate']} images [{pays['low']}, {pays['high'] or 'never'}]"


def _fastest(infos: dict[str, dict], session: Session) -> list[str]:
    exact = {id: info for id, info in infos.items() if not is_approximate(info["configuration"]["optimise"])}
    if not exact:
        return []
    best = ranked(exact)[0]
    time, speedup = interval_seconds(infos[best]["seconds_per_image"]), infos[best]["speedup"]
    if not speedup:
        return [fastest_line(best, time)]
    ratio = Interval(speedup["estimate"], speedup["low"], speedup["high"])
    return [fastest_line(best, time, ratio, speedup["against"])]
