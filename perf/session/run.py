"""A measuring session, from the device lock to the result. Imports neither torch nor pytest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from perf.analysis.verdicts import Decision, Verdict, decide_paired
from perf.configurations.configuration import Configuration
from perf.launch.process import ROOT
from perf.machine.nvml import Device, NoTelemetry, open_device, open_visible_device
from perf.machine.stack import PEAK_RATES, stack
from perf.machine.telemetry import Watch, no_watch
from perf.runs import fingerprints
from perf.session.lock import DeviceLock
from perf.session.measurements import Measurements, paired_medians
from perf.session.plan import Plan
from perf.session.progress import SessionProgress
from perf.session.references import References
from perf.session.resume import OpenJournal, resume_journal, start_journal
from perf.session.runner import Runner
from perf.session.settings import Settings
from perf.session.traces import trace_all
from perf.session.workers import Launches, compile_cache


@dataclass
class Session:
    """The result of a session. stack: `machine_info.stack` of a saved run."""

    settings: Settings
    plan: Plan
    measurements: Measurements
    stack: dict
    started_unix_seconds: float
    seconds: float
    unchecked: dict[str, str]  # configurations without a reference image, with the reason
    decisions: dict[str, Decision]  # of pairs within the session, by configuration id
    interrupted: bool
    traces: dict[str, dict] = field(default_factory=dict)  # by configuration id

    def why_no_rounds(self, id: str) -> str:
        """Why a configuration without a failure has no valid round."""
        rounds = [round_ for launch in self.measurements.by_name[id].launches.values() for round_ in launch.rounds]
        if rounds:
            return f"every round was invalid ({rounds[-1]['invalid']})"
        return "interrupted before its first round" if self.interrupted else "no round was measured"


def run(settings: Settings, configurations: list[Configuration], log: Callable[[str], None]) -> Session:
    """Measure the configurations. log(line) prints a line. Raises SessionError, DeviceBusy or JournalError."""
    begin = time.time()
    plan = _plan(settings, configurations)
    gpu = open_visible_device() if settings.device == "cuda" else None
    facts = stack(settings.device, gpu)
    with _device_lock(facts, log), compile_cache(settings.compile_cache) as cache:
        launches = Launches(settings, cache)
        probed = launches.probe([slot.configuration for slot in plan.slots])
        facts.update({name: probed[name] for name in PEAK_RATES})
        watch = _watch(gpu, probed["uuid"], log)
        opened = _open_journal(settings, plan, facts, begin, log)
        measurements, interrupted, traces = opened.measurements, False, {}
        with opened.journal as journal, SessionProgress() as progress:
            progress.plan(plan.turns())
            references = _references(settings, launches, facts)
            references.prepare(plan.slots, progress.log)
            runner = Runner(
                plan,
                open_launch=launches.open,
                load=launches.load_arguments,
                references=references.files,
                watch=watch,
                write=journal.write,
                progress=progress,
                limits=settings.limits,
            )
            try:
                runner.run(measurements)
                if settings.against or settings.second:
                    _double_inconclusive(runner, measurements, _judge_pairs(settings, measurements), progress)
                journal.write("end", {})
                if settings.trace:
                    slots = [slot for slot in plan.own_slots if measurements.by_name[slot.name].failure is None]
                    traces = trace_all(launches, slots, settings.trace, settings.limits, progress.log)
            except KeyboardInterrupt:  # the measured rounds are in the journal, for --perf-resume
                interrupted = True
    references.add_unchecked_launches(measurements)
    decisions = _judge_pairs(settings, measurements)
    seconds, started = time.time() - begin, opened.started_unix_seconds
    return Session(
        settings, plan, measurements, facts, started, seconds, references.unchecked, decisions, interrupted, traces
    )


def _plan(settings: Settings, configurations: list[Configuration]) -> Plan:
    slots = tuple(slot for configuration in configurations for slot in settings.slots(configuration))
    return Plan(slots, settings.launches, settings.rounds, settings.side_by_side)


@contextlib.contextmanager
def _device_lock(facts: dict, log: Callable[[str], None]) -> Iterator[None]:
    with DeviceLock(facts["uuid"] or facts["device"]) as lock:
        if lock.notice:
            log(lock.notice)
        yield


def _watch(gpu: Device | NoTelemetry | None, uuid: str | None, log: Callable[[str], None]):
    """The telemetry around each round. gpu: None on a CPU. uuid: of the GPU that torch uses, where torch reports it."""
    if gpu is None:
        return no_watch
    device = open_device(uuid) if uuid else gpu
    if isinstance(device, NoTelemetry):
        log(f"perf: no telemetry: {device.reason}")
    return Watch(device)


def _open_journal(settings: Settings, plan: Plan, facts: dict, begin: float, log: Callable[[str], None]) -> OpenJournal:
    folder = settings.folder / "journal"
    protocol = {
        **plan.as_dict(),
        "clock": settings.clock,
        "threads": settings.threads,
        "isolated": settings.isolated,
        "slowdown": settings.slowdown,
        "against": settings.against_name,
        "source": fingerprints.source_sha256(ROOT / "sd"),
        "stack": {key: facts[key] for key in ("name", "uuid", "driver", "torch")},
    }
    if not settings.resume:
        return start_journal(folder, plan, protocol, begin)
    return resume_journal(folder, plan, protocol, log, None if settings.resume is True else settings.resume)


def _references(settings: Settings, launches: Launches, facts: dict) -> References:
    folder = settings.folder / "references"
    return References(folder, launches, settings.device, facts, settings.interpreters, settings.limits)


def _double_inconclusive(
    runner: Runner, measurements: Measurements, decisions: dict[str, Decision], progress: SessionProgress
) -> None:
    """Measure the inconclusive pairs of commits for as many launches again."""
    ids = [id for id, decision in decisions.items() if decision.verdict is Verdict.INCONCLUSIVE]
    if not ids:
        return
    launches = runner.plan.launches
    progress.log(f"perf: inconclusive after {launches} launches, doubling them: {', '.join(ids)}")
    runner.plan = runner.plan.doubled(ids)
    progress.plan(runner.plan.turns(launches))
    runner.run(measurements, first=launches)


def _judge_pairs(settings: Settings, measurements: Measurements) -> dict[str, Decision]:
    if not settings.variant:
        return {}
    decisions = judge_pairs(measurements, settings.variant, settings.against_name or "itself", settings.margin)
    if settings.second:
        return {id: replace(decision, against=settings.other_name(id)) for id, decision in decisions.items()}
    return decisions


def judge_pairs(measurements: Measurements, variant: str, against: str, margin: float) -> dict[str, Decision]:
    """Compare each configuration with its variant by paired launch medians; return the decisions by configuration id.

    Pairs with a failure are omitted. against: the name of the variant in the decisions. margin: as a fraction.
    """
    invalid, decisions = measurements.invalid(), {}
    for slot in measurements.plan.own_slots:
        id = slot.configuration.id
        head, base = measurements.by_name[id], measurements.by_name[f"{id}@{variant}"]
        if head.failure or base.failure:
            continue
        if invalid:
            decisions[id] = Decision(Verdict.INVALID, invalid, against=against)
        else:
            medians = paired_medians(head, base)
            decisions[id] = decide_paired(*medians, margin, seed=f"{id} {against}", against=against)
    return decisions
