"""A measuring session: from a list of configurations to measured rounds, with everything around them in its place.

Locks the device, asks a first process what it is, makes the reference pictures that are not there yet, opens the journal,
and runs the protocol. Imports neither torch nor pytest: the workers have the one, perf.plugin.hooks is the other.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, field

from perf.analysis.verdicts import Decision, Verdict, decide_paired
from perf.configurations.configuration import Configuration
from perf.launch.process import ROOT
from perf.machine.nvml import NoTelemetry, open_device, open_visible_device
from perf.machine.stack import CEILINGS, stack
from perf.machine.telemetry import Watch, no_watch
from perf.runs import fingerprints as weights
from perf.session import journal
from perf.session.lock import DeviceLock
from perf.session.measurements import Measurements, paired_medians
from perf.session.plan import Plan, Slot
from perf.session.progress import SessionProgress
from perf.session.references import References, unchecked
from perf.session.runner import Runner
from perf.session.settings import SessionError, Settings
from perf.session.traces import trace_all
from perf.session.workers import Launches, compile_cache


@dataclass
class Session:
    """What was measured, and on what."""

    settings: Settings
    plan: Plan
    measurements: Measurements
    stack: dict
    started_unix_seconds: float
    seconds: float
    unchecked: dict[str, str]  # configurations without a reference picture, and why
    decisions: dict[str, Decision]  # of pairs, by the configuration's id
    interrupted: bool
    traces: dict[str, dict] = field(default_factory=dict)  # by the configuration's id

    def why_no_rounds(self, id: str) -> str:
        """Why a configuration that did not fail has no valid round."""
        thrown = [one["invalid"] for launch in self.measurements.by_name[id].launches.values() for one in launch.rounds]
        if thrown:
            return f"every round was invalid ({thrown[-1]})"
        return "interrupted before its first round" if self.interrupted else "no round was measured"


def run(settings: Settings, configurations: list[Configuration], say) -> Session:
    """Measure. say(words) prints a line that stays. Raises SessionError, DeviceBusy or JournalError."""
    begin = time.time()
    gpu = open_visible_device() if settings.device == "cuda" else None
    facts = stack(settings.device, gpu)
    with contextlib.ExitStack() as keep:
        lock = keep.enter_context(DeviceLock(facts["uuid"] or facts["device"]))
        if lock.notice:
            say(lock.notice)
        cache = keep.enter_context(compile_cache(settings.compile_cache))
        plan = _plan(settings, configurations)
        launches = Launches(settings, cache)
        probed = launches.probe(configurations)
        facts = {**facts, **{name: probed[name] for name in CEILINGS}}
        if settings.device == "cuda":
            gpu = open_device(probed["uuid"]) if probed["uuid"] else gpu
            if isinstance(gpu, NoTelemetry):
                say(f"perf: no telemetry: {gpu.reason}")
        watch = Watch(gpu) if gpu is not None else no_watch
        book, measurements, started = _open_journal(settings, plan, facts, begin, say)
        with book, SessionProgress() as progress:
            progress.plan(plan.turns())
            references = References(settings, launches, facts)
            references.prepare(plan, progress.say)
            runner = Runner(
                plan,
                open_launch=launches.open,
                load=launches.load_arguments,
                references=references.of,
                watch=watch,
                write=book.write,
                progress=progress,
                limits=settings.limits,
            )
            interrupted, traces = False, {}
            try:
                decisions = _decide(settings, runner, measurements, progress)
                book.write("end", {})
                if settings.trace:
                    slots = [slot for slot in plan.slots if slot.variant is None]
                    slots = [slot for slot in slots if measurements.by_name[slot.name].failure is None]
                    traces = trace_all(launches, slots, settings.trace, settings.limits, progress.say)
            except KeyboardInterrupt:  # what has been measured is kept, and --perf-resume goes on from the journal
                interrupted, decisions = True, judge_pairs(settings, measurements)
    return Session(
        settings,
        plan,
        measurements,
        facts,
        started,
        time.time() - begin,
        unchecked(references, measurements),
        decisions,
        interrupted,
        traces,
    )


def _decide(settings: Settings, runner: Runner, measurements: Measurements, progress) -> dict[str, Decision]:
    """Run the plan; once more as much for pairs of commits that are undecided after it."""
    runner.run(measurements)
    decisions = judge_pairs(settings, measurements)
    undecided = [id for id, one in decisions.items() if one.verdict is Verdict.INCONCLUSIVE]
    if not settings.against or not undecided:
        return decisions
    launches = runner.plan.launches
    progress.say(f"perf: undecided after {launches} launches, doubling them: {', '.join(undecided)}")
    runner.plan = runner.plan.doubled(undecided)
    progress.plan(runner.plan.turns(launches))
    runner.run(measurements, first=launches)
    return judge_pairs(settings, measurements)


def _plan(settings: Settings, configurations: list[Configuration]) -> Plan:
    variants = [None] + ([settings.variant] if settings.variant else [])
    slots = tuple(Slot(configuration, variant) for configuration in configurations for variant in variants)
    return Plan(slots, settings.launches, settings.rounds, settings.side_by_side)


def judge_pairs(settings: Settings, measurements: Measurements) -> dict[str, Decision]:
    """The verdict on each configuration against its other label in this session, by launch medians; empty without one."""
    if not settings.variant:
        return {}
    invalid, decisions = measurements.invalid(), {}
    against = settings.against[0] if settings.against else "itself"
    for slot in measurements.plan.slots:
        if slot.variant is not None:
            continue
        id = slot.configuration.id
        head, base = measurements.by_name[id], measurements.by_name[f"{id}@{settings.variant}"]
        if head.failure or base.failure:
            continue
        if invalid:
            decisions[id] = Decision(Verdict.INVALID, invalid, against=against)
            continue
        decisions[id] = decide_paired(
            *paired_medians(head, base),
            settings.margin,
            seed=f"{id} {against}",
            against=against,
        )
    return decisions


# --- the journal


def _open_journal(settings: Settings, plan: Plan, facts: dict, now: float, say):
    """(journal, what is known, Unix seconds of the session's start): gone on with, it is the same session."""
    folder = settings.folder / "journal"
    wanted = {
        **plan.as_dict(),
        "clock": settings.clock,
        "threads": settings.threads,
        "isolated": settings.isolated,
        "slowdown": settings.slowdown,
        "against": settings.against[0] if settings.against else None,
        "source": weights.source_sha256(ROOT / "sd"),
        "stack": {key: facts[key] for key in ("name", "uuid", "driver", "torch")},
    }
    if not settings.resume:
        ns = time.time_ns()  # in UTC: the newest is the last by name, also when the clocks go back in autumn
        path = folder / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(ns // 10**9))}-{ns % 10**9:09d}.jsonl"
        book = journal.Journal(path, {**wanted, "started_unix_seconds": now})
        journal.prune(folder)
        return book, Measurements(plan), now
    path = journal.newest(folder)
    if path is None:
        raise SessionError(f"--perf-resume: there is no journal in {folder}; start without it")
    recorded = journal.read(path)
    if recorded.damage:
        say(f"{path}: {recorded.damage}")
    if recorded.ended:
        say(f"{path}: that session had come to its end; nothing is left to measure")
    for key, value in wanted.items():
        before, value = recorded.plan.get(key), json.loads(json.dumps(value))
        if before != value:
            if key == "configurations" and before:  # of the same names, or `slots` would have differed
                before, value = next(_differing(*pair) for pair in zip(before, value) if pair[0] != pair[1])
            raise SessionError(
                f"--perf-resume: {path} was started with other {key}: {before!r}, now {value!r}; "
                f"give the same options as then, or start again without --perf-resume"
            )
    try:
        measurements = Measurements(plan, recorded.events)
    except (KeyError, TypeError, ValueError) as error:
        raise SessionError(f"{path}: cannot be gone on from ({error}); start again without --perf-resume") from None
    say(f"perf: going on from {path}: {measurements.counts()[1]} rounds are there")
    started = recorded.plan.get("started_unix_seconds")
    started = started if isinstance(started, float) and 0 < started <= now else now
    return journal.Journal(path, after=recorded), measurements, started


def _differing(before: dict, now: dict) -> tuple[dict, dict]:
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return {key: before.get(key) for key in keys}, {key: now.get(key) for key in keys}
