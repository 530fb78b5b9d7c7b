"""Terminal summary of `pytest perf`: one ranked table, then the lines about its validity."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from perf.analysis import ranking
from perf.analysis.paired import LOOKS
from perf.analysis.statistics import Interval
from perf.analysis.verdicts import Decision, Verdict, percent
from perf.configurations.configuration import images_per_round, is_reference, name_of_work, sampling
from perf.plugin.state import Results
from perf.report.text import counted, counted_range, interval_seconds, size
from perf.session import record
from perf.session.run import Session

STYLES = {"SLOWER": "bold red", "INVALID": "bold red", "FASTER": "green", "SAME": "", "INCONCLUSIVE": "yellow"}
WIDE = 150  # columns of a terminal that holds one line per configuration; the other layout fits 80
FEW_STEPS = 4  # up to which the share of each stage is printed
COLUMNS = ("time", "images/s", "speed-up", "peak memory", "energy", "of peak FLOP/s", "image", "marks", "verdict")
COLUMNS += ("reason",)


def write(reporter, results: Results, partial: str | None) -> None:
    """Print the summary to pytest's terminal, with colour if it has any."""
    reporter.section("perf", sep="-")
    terminal = reporter._tw
    console = Console(
        file=terminal._file,
        width=max(terminal.fullwidth, 80),
        force_terminal=terminal.hasmarkup,
        no_color=not terminal.hasmarkup,
        highlight=False,
    )
    if results.infos or failures(results.session):
        print_table(console, results)
    for line in lines(results, partial):
        console.print(line, markup=False, soft_wrap=True)


def ranked(results: Results) -> list[str]:
    """Ids by work, each from the fastest image to the slowest."""
    return [entry.id for entry in ranking.ranked(entries(results))]


def entries(results: Results) -> list[ranking.Entry]:
    """The measured configurations as entries of a ranking."""
    return [_entry(results, id) for id in results.infos]


def _entry(results: Results, id: str) -> ranking.Entry:
    info, decision = results.infos[id], results.decisions.get(id)
    configuration, speedup = info["configuration"], info["speedup"]
    marks = record.marks(results.session, info, decision)
    images = images_per_round(configuration)
    rounds = [
        [None if str(i) in launch["invalid"] else seconds / images for i, seconds in enumerate(launch["round_seconds"])]
        for launch in info["launches"]
    ]
    return ranking.Entry(
        id=id,
        seconds=info["seconds_per_image"],
        rounds=rounds,
        work=ranking.work_of(configuration),
        text=interval_seconds(info["seconds_per_image"]),
        why_not=next((mark for mark in marks if mark != "drifted"), None),
        is_reference=is_reference(configuration),
        speedup=Interval(*(speedup[key] for key in ("estimate", "low", "high"))) if speedup else None,
        against=speedup["against"] if speedup else "original",
    )


def failures(session: Session) -> dict[str, str]:
    """Reasons of the failed configurations of the working tree, by id; unavailable ones are skips, not failures."""
    reasons = {}
    for slot in session.plan.slots:
        failure = session.measurements.by_name[slot.name].failure
        if slot.variant is None and failure and failure[0] != "unavailable":
            reasons[slot.configuration.id] = f"{failure[0]}: {failure[1]}"
    return reasons


def print_table(console: Console, results: Results) -> None:
    """Print a table for each work, the fastest configuration first and the failed ones last."""
    works: dict[tuple, list] = {}
    for id in ranked(results):
        work = ranking.work_of(results.infos[id]["configuration"])
        works.setdefault(work, []).append((id, cells(results, id), results.decisions.get(id)))
    clock = "CPU time/image [95 %]" if results.session.settings.clock == "cpu" else "time/image [95 %]"
    for rows in works.values():
        if len(works) > 1:
            work = _work(results.infos[rows[0][0]]["configuration"])
            console.print(Text(f"{work}: not comparable with the other tables", "bold"))
        if console.width >= WIDE:
            console.print(_wide(clock, rows))
            continue
        for line in _narrow(clock, rows):
            line.rstrip()
            console.print(line, soft_wrap=True)
    for id, reason in failures(results.session).items():
        console.print(Text.assemble((f"{id}  ", ""), ("INVALID", STYLES["INVALID"]), f" ({reason})"), soft_wrap=True)


def _work(configuration: dict) -> str:
    size = configuration["height"], configuration["width"]
    parts = sampling(*(configuration[field] for field in ("timestep_spacing", "sigmas", "scale")))
    return name_of_work(*(configuration[field] for field in ("model", "workload", "sampler", "steps")), size, parts)


def cells(results: Results, id: str) -> dict[str, str]:
    """The known values of a configuration by column; unknown ones are left out."""
    info, decision = results.infos[id], results.decisions.get(id)
    bounds, images = record.interval(results.session.measurements.by_name[id]), images_per_round(info["configuration"])
    time, speedup, image = info["seconds_per_image"], info["speedup"], info["image"]
    memory = info["peak_bytes"]["allocated"] or info["peak_bytes"]["rss"]
    values = {
        "time": interval_seconds(time, *(bound / images for bound in bounds or ())),
        "images/s": f"{1 / time:.3g}",
        "peak memory": size(memory) if memory else "",
        "energy": f"{info['joules_per_image']:.1f} J/image" if info["joules_per_image"] else "",
        "of peak FLOP/s": f"{100 * info['flops_fraction']:.1f} %" if info["flops_fraction"] else "",
    }
    if speedup:
        values["speed-up"] = f"{speedup['estimate']:.2f}x [{speedup['low']:.2f}, {speedup['high']:.2f}]"
    elif is_reference(info["configuration"]):
        values["speed-up"] = "reference"
    if image["psnr_db"] is not None:
        values["image"] = f"{image['psnr_db']:.0f} dB"
    values["marks"] = ", ".join(record.marks(results.session, info, decision))
    if decision:
        values["verdict"], _, values["reason"] = str(decision).partition(" ")
    return {column: value for column, value in values.items() if value}


def _style(decision: Decision | None) -> str:
    return STYLES[decision.verdict.value] if decision else ""


def _wide(clock: str, rows) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("configuration", overflow="fold")
    columns = [column for column in COLUMNS if any(column in values for _, values, _ in rows)]
    for column in columns:
        justify = "left" if column in ("verdict", "reason") else "right"
        table.add_column(clock if column == "time" else column, justify=justify)
    for id, values, decision in rows:
        styles = {"verdict": _style(decision)}
        table.add_row(Text(id), *(Text(values.get(column, ""), styles.get(column, "")) for column in columns))
    return table


def _narrow(clock: str, rows) -> Iterator[Text]:
    """Two to four lines per configuration, each within 80 columns."""
    yield Text(f"   {clock:<30} {'images/s':>8}   {'speed-up':<21} verdict", "bold")
    forms = {
        "peak memory": "{} peak memory",
        "energy": "{}",
        "of peak FLOP/s": "{} of peak FLOP/s",
        "image": "image {}",
    }
    for rank, (id, values, decision) in enumerate(rows, 1):
        yield Text.assemble((f"{rank:>2} {id}", "bold"), (f"  {values.get('marks', '')}", "yellow"))
        numbers = f"   {values['time']:<30} {values['images/s']:>8}   {values.get('speed-up', ''):<21} "
        yield Text.assemble(numbers, (values.get("verdict", ""), _style(decision)))
        details = ", ".join(form.format(values[column]) for column, form in forms.items() if column in values)
        if details:
            yield Text(f"   {details}", "dim")
        if decision and decision.verdict is not Verdict.SAME:
            yield Text(f"   {values['reason']}", "dim")


def lines(results: Results, partial: str | None) -> list[str]:
    """The protocol, warnings, verdicts and the fastest configuration, one line each."""
    session, decisions, judgement = results.session, results.decisions, results.judgement
    text = [_protocol(session)]
    text += [_compiling(id, info) for id, info in results.infos.items() if info["compile"]]
    text += [_stage_shares(id, info) for id, info in results.infos.items() if _shows_stages(info)]
    tests = {slot.id for slot in session.plan.slots if slot.configuration.test}  # which check their results themselves
    unchecked = {id: reason for id, reason in session.unchecked.items() if id not in tests}
    text += [f"{id}: its output was not checked: {reason}" for id, reason in unchecked.items()]
    invalid, total = session.measurements.counts()
    if invalid:
        text.append(f"{invalid} of {total} rounds were invalid and measured again")
    if session.invalid:
        text.append(f"INVALID session: {session.invalid}: no baseline, no verdict")
    if drifted := session.measurements.drifted():
        text.append(f"drifted: {drifted}: absolute times are approximate, and the session is no baseline")
    if partial:
        text.append(f"partial run ({partial}): never chosen as a baseline")
    text += [f"{id}: {decision}" for id, decision in decisions.items()]
    text += _counts_lines(results)
    if decisions:
        text.append(_error_rate(decisions))
    text += _without_interval(results)
    text += [f"{id} is not compared: {reason}" for id, reason in results.not_compared.items()]
    if judgement and judgement.missing:
        text.append(f"in the baseline, but not measured: {', '.join(judgement.missing)}")
    if judgement and judgement.new:
        text.append(f"new, without a baseline: {', '.join(judgement.new)}")
    return text + ranking.fastest_lines(entries(results))


def _shows_stages(info: dict) -> bool:
    """Whether the stages are of interest: in training, and where the UNet runs few times."""
    configuration = info["configuration"]
    wanted = configuration["workload"] == "train" or configuration["steps"] <= FEW_STEPS
    return wanted and any(launch["stage_seconds"] for launch in info["launches"])


def _stage_shares(id: str, info: dict) -> str:
    """Median share of each stage in the wall time of a round; `other` is outside of them, of the host."""
    rounds = [
        dict(zip(launch["stage_seconds"], seconds))
        for launch in info["launches"]
        for seconds in zip(*launch["stage_seconds"].values())
        if None not in seconds
    ]
    shares = {
        name: statistics.median(100 * stages[name] / sum(stages.values()) for stages in rounds) for name in rounds[0]
    }
    text = ", ".join(f"{name} {max(share, 0):.1f} %" for name, share in shares.items())
    if info["configuration"]["workload"] != "train":
        return f"{id}: {text} of a round"
    update = interval_seconds(info["seconds_per_image"] * info["configuration"]["batch"])
    return f"{id}: {text} of an update, which takes {update}"


def _without_interval(results: Results) -> list[str]:
    """What finds a difference where comparisons with stored sessions have no interval of their own."""
    judged = results.judgement.decisions if results.judgement else {}
    inconclusive = [decision for decision in judged.values() if decision.verdict is Verdict.INCONCLUSIVE]
    bare = [decision for decision in inconclusive if " was detectable" not in decision.reason]
    if not bare:
        return []
    session = results.session
    launches = sum(len(measured.launches) for measured in session.measurements.by_name.values())
    minutes = [max(1, round(2 * look * session.seconds / max(1, launches) / 60)) for look in (LOOKS[0], LOOKS[-1])]
    return [
        f"{counted(len(bare), 'comparison')} with stored sessions could not have found any difference; "
        "--perf-against COMMIT needs no stored session and "
        f"takes about {minutes[0]} to {minutes[1]} min for each configuration"
    ]


def _counts_lines(results: Results) -> list[str]:
    """One line for each configuration whose counts changed or could not be compared, and one for all others."""
    different = [f"{id}: {compared}" for id, compared in results.counts.items() if not compared.same]
    same = {compared.against for compared in results.counts.values() if compared.same}
    if not same:
        return different
    count = counted(len(results.counts) - len(different), "configuration")
    return [*different, f"counts of {count} are those of {', '.join(sorted(same))}"]


def _protocol(session: Session) -> str:
    settings = session.settings
    clock = "CPU time" if settings.clock == "cpu" else "wall time"
    threads = f" of {counted(settings.threads, 'thread')}" if settings.threads else ""
    processes = {"all": "all alternating", "variants": "both sides alternating", "single": "in turns"}[
        session.plan.loading
    ]
    if not settings.isolated:
        processes = "one process: launch variance is not in the interval"
    drift = session.measurements.drift()
    reference = "" if drift is None else f", reference workload drift {100 * drift:.1f} %"
    made = [measured.ordered_launches() for measured in session.measurements.by_name.values()]
    launches = counted_range(map(len, made), "launch", "launches")
    rounds = counted_range((len(launch.valid()) for launch in itertools.chain.from_iterable(made)), "round")
    control = ""
    if session.control is not None and session.control.ratio is not None:
        control = f", control arm {percent(session.control.ratio.estimate):+.1f} %"
    return f"{clock}{threads}, {launches} of {rounds}, {processes}{reference}{control}; {session.seconds:.0f} s in all"


def _error_rate(decisions: dict[str, Decision]) -> str:
    margins = [decision.margin for decision in decisions.values() if decision.margin]
    margin = f", margin {100 * max(margins):.1f} %" if margins else ""
    return (
        f"{counted(len(decisions), 'comparison')}{margin}; without a change at most 1 in 40 is wrong in each direction"
    )


def _compiling(id: str, info: dict) -> str:
    first, graphs, amortised = info["first_call_seconds"], info["compile"], info["images_to_amortise"]
    cold = (
        "not cold, with --perf-compile-cache or --perf-inprocess"
        if first["cold"] is None
        else f"{first['cold']:.1f} s cold"
    )
    text = f"{id}: first call {cold}"
    if first["warm"] is not None:
        text += f", {first['warm']:.1f} s with a warm compile cache"
        text += f" (first image of a process after {info['first_picture_seconds']['warm']:.1f} s)"
    text += f"; {graphs['graph_breaks']} graph breaks, {graphs['recompiles']} recompiles"
    if amortised is None:
        return text
    if amortised["estimate"] is None:
        best = amortised["low"]
        return text + ("; never pays here" if best is None else f"; not shown to pay, at best after {best} images")
    return text + f"; pays after {amortised['estimate']} images [{amortised['low']}, {amortised['high'] or 'never'}]"
