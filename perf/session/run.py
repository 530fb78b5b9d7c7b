"""A measuring session, from the device lock to the result. Imports neither torch nor pytest."""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from perf.analysis.verdicts import Decision
from perf.configurations.configuration import Configuration
from perf.launch.process import ROOT
from perf.machine.facts import cpu_facts
from perf.machine.nvml import Device, NoTelemetry, open_device, open_visible_device
from perf.machine.stack import PEAK_RATES, stack
from perf.machine.telemetry import Watch, no_watch
from perf.runs import fingerprints
from perf.session import loading, noise, pairs
from perf.session.lock import DeviceLock
from perf.session.measurements import Measurements
from perf.session.pairs import Judge
from perf.session.plan import Plan
from perf.session.references import References
from perf.session.resume import OpenJournal, resume_journal, start_journal
from perf.session.runner import Runner
from perf.session.settings import SessionRefused, Settings
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
    control: Decision | None = None  # the control arm against its twin
    invalid: str | None = None  # why no comparison is valid
    traces: dict[str, dict] = field(default_factory=dict)  # by configuration id

    def why_no_rounds(self, id: str) -> str:
        """Why a configuration without a failure has no valid round."""
        rounds = [round_ for launch in self.measurements.by_name[id].launches.values() for round_ in launch.rounds]
        if rounds:
            return f"every round was invalid ({rounds[-1]['invalid']})"
        return "interrupted before its first round" if self.interrupted else "no round was measured"


def run(settings: Settings, configurations: list[Configuration], log: Callable[[str], None]) -> Session:
    """Measure the configurations. log(line) prints a line. Raises SessionError, DeviceBusy or JournalError."""
    from perf.session.progress import SessionProgress  # rich, which a start of pytest without measuring does not need

    begin = time.time()
    gpu = open_visible_device() if settings.device == "cuda" else None
    facts = stack(settings.device, gpu)
    if settings.device == "cpu":
        log(noise.expectation(cpu_facts(), settings))
    plan, reason = _plan(settings, configurations, gpu)
    with (
        _device_lock(facts, log),
        compile_cache(settings.compile_cache) as cache,
        tempfile.TemporaryDirectory(prefix="sd-perf-references-") as own_references,
    ):
        launches = Launches(settings, cache)
        probed = launches.probe([slot.configuration for slot in plan.slots])
        uuids = facts["uuid"], probed["uuid"]  # torch gives a part of a GPU, whose name begins with MIG, as a whole one
        if None not in uuids and uuids[0] != uuids[1] and not uuids[0].startswith("MIG"):
            raise SessionRefused(
                f"torch uses the GPU {probed['uuid']}, and the first one of the driver is {facts['name']}, {facts['uuid']}: "
                "set CUDA_DEVICE_ORDER=PCI_BUS_ID and choose the GPU by CUDA_VISIBLE_DEVICES"
            )
        facts.update({name: probed[name] for name in PEAK_RATES})
        watch = _watch(gpu, probed["uuid"], log)
        opened = _open_journal(settings, plan, facts, begin, log)
        if opened.measurements.plan.loading != plan.loading:
            reason = loading.DESCRIPTIONS[opened.measurements.plan.loading]
        if reason:
            log(f"perf: {reason}")
        plan, measurements, interrupted, traces = opened.measurements.plan, opened.measurements, False, {}
        judge = _judge(settings, plan)
        with opened.journal as journal, SessionProgress() as progress:
            progress.plan(plan.turns(), plan.rounds)
            references = _references(settings, launches, facts, Path(own_references))
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
                loaded=watch.worker_pids.add if isinstance(watch, Watch) else ignore_pid,
                counting=settings.counting,
                loads_at_once=loading.at_once(settings.threads, cpu_facts()),
            )

            def planned(further: Plan, first: int, last: int) -> None:
                progress.plan(further.turns(first, last), further.rounds)

            try:
                pairs.measure(runner, measurements, judge, progress.log, planned)
                journal.write("end", {})
            except KeyboardInterrupt:  # the measured rounds are in the journal, for --perf-resume
                interrupted = True
            if settings.trace and not interrupted:
                slots = [slot for slot in plan.own_slots if measurements.by_name[slot.name].failure is None]
                traces = trace_all(launches, slots, settings.trace, settings.limits, progress.log)
    references.add_unchecked_launches(measurements)
    seconds = time.time() - begin
    judge.launch_seconds = seconds / max(1, measurements.most_launches())
    return Session(
        settings,
        plan,
        measurements,
        facts,
        opened.started_unix_seconds,
        seconds,
        references.unchecked,
        judge.decisions(measurements),
        interrupted,
        judge.control(measurements),
        judge.invalid(measurements),
        traces,
    )


def _plan(
    settings: Settings,
    configurations: list[Configuration],
    gpu: Device | NoTelemetry | None,
) -> tuple[Plan, str | None]:
    """The slots with their control arm, loaded together where memory allows, and what the terminal says of that."""
    slots = [slot for configuration in configurations for slot in settings.slots(configuration)]
    if len(slots) > 1 and _needs_control(settings):
        control = pairs.control_slot(slots)
        last = max(i for i, slot in enumerate(slots) if slot.id == control.id)
        slots.insert(last + 1, control)
    what = "GPU memory" if settings.device == "cuda" else "memory"
    choice, reason = loading.choose(slots, free_bytes(settings, gpu), what)
    if settings.loading:
        choice, reason = settings.loading, loading.DESCRIPTIONS[settings.loading]
    looks = settings.looks if len(settings.looks) > 1 else ()
    seed = random.randrange(2**32)
    plan = Plan(tuple(slots), settings.launches, settings.rounds, choice, seed, looks, settings.most_rounds)
    return plan, reason


def _needs_control(settings: Settings) -> bool:
    """Whether a control arm is measured. The second labels of --perf-aa are control arms themselves.

    Without pairs few launches are cheap first impressions, and their control arm would show gross faults only.
    """
    fewest = pairs.CONTROL_LAUNCHES if settings.variant else pairs.UNPAIRED_CONTROL_LAUNCHES
    return settings.isolated and settings.launches >= fewest and not settings.aa


def free_bytes(settings: Settings, gpu: Device | NoTelemetry | None) -> int | None:
    """The memory that workers may share: of the GPU, or of this machine; None if unknown."""
    if settings.device != "cuda":
        return cpu_facts().memory_available_bytes
    if gpu is None or isinstance(gpu, NoTelemetry):
        return None
    facts = gpu.facts()
    if facts.memory_bytes is None or facts.memory_used_bytes is None:
        return None
    return facts.memory_bytes - facts.memory_used_bytes


def ignore_pid(pid: int) -> None:
    """Without telemetry nothing watches for foreign processes."""


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
        "harness": fingerprints.source_sha256(ROOT / "perf"),
        "own": _own_sources(plan, settings),
        "interpreters": {label: interpreter.python for label, interpreter in settings.interpreters.items()},
        "stack": {key: facts[key] for key in ("name", "processor", "uuid", "driver", "torch")},
    }
    if not settings.resume:
        return start_journal(folder, plan, protocol, begin)
    name = None if settings.resume is True else settings.resume
    return resume_journal(folder, plan, protocol, log, name, settings.loading)


def _own_sources(plan: Plan, settings: Settings) -> dict[str, str]:
    """Hashes of the files of the user's own engines and tests; those of modules that they import are not known here."""
    hashes = {}
    for configuration in (slot.configuration for slot in plan.slots if slot.configuration.own):
        name = configuration.engine.partition(":")[0]
        folder = settings.rootpath if configuration.test else settings.directory
        module = name.replace(".", "/")
        for path in (name, f"{module}.py", f"{module}/__init__.py"):
            if (folder / path).is_file():
                hashes[path] = fingerprints.sha256(folder / path)
    return hashes


def _references(settings: Settings, launches: Launches, facts: dict, own_folder: Path) -> References:
    folder = settings.folder / "references"
    return References(
        folder, launches, settings.device, facts, settings.interpreters, settings.limits, own_folder=own_folder
    )


def _judge(settings: Settings, plan: Plan) -> Judge:
    """The comparisons of a session: each configuration with its second label."""
    compared = pairs.pairs_of(plan, settings.variant, lambda id: settings.other_name(id) or "itself")
    return Judge(plan, compared, settings.margin)
