"""A measuring session: from a list of configurations to measured rounds, with everything around them in its place.

Locks the device, asks a first process what it is, makes the reference pictures that are not there yet, opens the journal,
and runs the protocol. Imports neither torch nor pytest: the workers have the one, perf.plugin is the other.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from perf import images, journal, trace, weights
from perf.configurations import Configuration
from perf.launcher import InProcessLaunch, Interpreter, ProcessLaunch, WorkerError
from perf.lock import DeviceLock
from perf.machine_stack import stack
from perf.nvml import NoTelemetry, open_device, open_visible_device
from perf.progress import SessionProgress
from perf.protocol import Limits, Measurements, Plan, Runner, Slot
from perf.telemetry import Monitor, invalid_reason
from perf.verdicts import Decision, Verdict, decide_paired


class SessionError(Exception):
    """A session that cannot start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class Settings:
    """How a session measures.

    clock: `wall` or `cpu`. threads: of torch on the CPU, None for torch's own choice. isolated: each launch in a fresh
    process. interpreters: other Pythons by label. against: (name, interpreter with its `sd`) of another commit. aa: every
    configuration against itself. slowdown: a fraction by which the working tree is slowed, for tests of the gate.
    margin: the change that counts, as a fraction. folder: where the journal and the reference pictures are.
    trace: where a traced round of each configuration goes, None for none.
    """

    device: str
    folder: Path
    clock: str = "wall"
    threads: int | None = None
    launches: int = 10
    rounds: int = 2
    isolated: bool = True
    resume: bool = False
    interpreters: dict[str, Interpreter] = field(default_factory=dict)
    against: tuple[str, Interpreter] | None = None
    aa: bool = False
    slowdown: float = 0.0
    margin: float = 0.01
    limits: Limits = field(default_factory=Limits)
    trace: Path | None = None

    @property
    def variant(self) -> str | None:
        """The second label that every configuration has in this session, if any."""
        return "base" if self.against else "aa" if self.aa else None


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
    started = time.time()
    gpu = open_visible_device() if settings.device == "cuda" else None
    facts = stack(settings.device, gpu)
    with contextlib.ExitStack() as keep:
        lock = keep.enter_context(DeviceLock(facts["uuid"] or facts["device"]))
        if lock.notice:
            say(lock.notice)
        cache = keep.enter_context(compile_cache())
        plan = _plan(settings, configurations)
        launches = Launches(settings, cache)
        probed = launches.probe()
        facts = {**facts, "matmul_flops_per_second": probed["matmul_flops_per_second"]}
        if settings.device == "cuda":
            gpu = open_device(probed["uuid"]) if probed["uuid"] else gpu
            if isinstance(gpu, NoTelemetry):
                say(f"perf: no telemetry: {gpu.reason}")
        watch = Watch(gpu) if gpu is not None else no_watch
        book, measurements = _open_journal(settings, plan, facts, say)
        with book, SessionProgress(len(plan.slots) * plan.launches) as progress:
            progress.plan(plan.turns())
            references = _References(settings, launches, facts)
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
                    traces = trace.trace_all(launches, slots, settings.trace, settings.limits, progress.say)
            except KeyboardInterrupt:  # what has been measured is kept, and --perf-resume goes on from the journal
                interrupted, decisions = True, judge_pairs(settings, measurements)
    return Session(
        settings,
        plan,
        measurements,
        facts,
        started,
        time.time() - started,
        references.unchecked,
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
    return Plan(slots, settings.launches, settings.rounds)


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
        both = [n for n in sorted(head.launches) if n in base.launches and head.median(n) and base.median(n)]
        decisions[id] = decide_paired(
            [head.median(n) for n in both],
            [base.median(n) for n in both],
            settings.margin,
            seed=f"{id} {against}",
            against=against,
        )
    return decisions


# --- launches


class Launches:
    """Opens workers: which interpreter, which `sd`, and what they are told to load."""

    def __init__(self, settings: Settings, compile_cache: str):
        self.settings = settings
        # The first launch of a session compiles into an empty cache and the others find it: cold and warm, both measured.
        self.environment = (("TORCHINDUCTOR_CACHE_DIR", compile_cache),)
        if settings.threads:
            self.environment += tuple((name, str(settings.threads)) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))

    def open(self, slot: Slot):
        """A worker for a slot, as a context."""
        if not self.settings.isolated:
            return InProcessLaunch()
        return ProcessLaunch(self.interpreter(slot))

    def interpreter(self, slot: Slot) -> Interpreter:
        """The Python of a slot, and where its `sd` is."""
        label = slot.configuration.interpreter
        chosen = self.settings.interpreters[label] if label else Interpreter()
        if slot.variant == "base":
            chosen = Interpreter(chosen.python, self.settings.against[1].source)
        return Interpreter(chosen.python, chosen.source, self.environment)

    def load_arguments(self, slot: Slot) -> dict:
        """What a slot's worker is asked to load."""
        slowed = self.settings.slowdown if slot.variant is None else 0.0
        return {
            "configuration": slot.configuration.as_dict(),
            "device": slot.configuration.device or self.settings.device,
            "clock": self.settings.clock,
            "threads": self.settings.threads,
            "slowdown": slowed,
        }

    def probe(self) -> dict:
        """What torch and the device are, asked of a process of its own. Raises SessionError."""
        try:
            with self.open(Slot(Configuration())) as worker:
                settings = self.settings
                return worker.ask(
                    "probe", 600.0, device=settings.device, clock=settings.clock, threads=settings.threads
                )
        except WorkerError as error:
            raise SessionError(f"nothing can be measured: {error}") from None


@contextlib.contextmanager
def compile_cache():
    folder = tempfile.mkdtemp(prefix="sd-perf-compile-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- references


class _References:
    """The pictures that timed rounds are compared with, made once and kept by content."""

    def __init__(self, settings: Settings, launches: Launches, facts: dict):
        self.settings, self.launches, self.facts = settings, launches, facts
        self.folder = settings.folder / "references"
        self.unchecked: dict[str, str] = {}

    def of(self, slot: Slot, seed: int) -> list[str] | None:
        """The files of a round's images, or None where there are none."""
        if slot.configuration.id in self.unchecked:
            return None
        return [str(self._path(slot.configuration, one)) for one in images.image_seeds(slot.configuration, seed)]

    def _path(self, configuration: Configuration, seed: int) -> Path:
        label = configuration.interpreter
        torch = self.settings.interpreters[label].python if label else self.facts["torch"]
        origin = {"device": f"{configuration.device or self.settings.device} {self.facts['name']}", "torch": torch}
        return images.reference_path(self.folder, configuration, seed, weights.identity(configuration), origin)

    def prepare(self, plan: Plan, say) -> None:
        """Make what is missing, one process a reference configuration."""
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted: dict[Configuration, dict[Path, int]] = {}
        users: dict[Configuration, list[str]] = {}
        for configuration in dict.fromkeys(slot.configuration for slot in plan.slots):
            try:
                paths = {self._path(configuration, seed): seed for seed in _first_round(configuration)}
            except OSError as error:
                self.unchecked[configuration.id] = f"{error.filename}: {error.strerror}"
                continue
            reference = self._reference(configuration)
            users.setdefault(reference, []).append(configuration.id)
            missing = {path: seed for path, seed in paths.items() if not path.exists()}
            wanted.setdefault(reference, {}).update(missing)
        for reference, missing in wanted.items():
            if not missing:
                continue
            say(f"perf: making {len(missing)} reference picture(s) with {reference.id}")
            try:
                self._make(reference, missing)
            except WorkerError as error:
                self.unchecked.update(dict.fromkeys(users[reference], str(error)))

    def _reference(self, configuration: Configuration) -> Configuration:
        """Whose picture is the right one; by this interpreter, unless the weights are random and so its own."""
        reference = configuration.reference()
        if weights.identity(configuration)["kind"] == "random":
            return reference
        return Configuration(**{**vars(reference), "interpreter": None})

    def _make(self, reference: Configuration, missing: dict[Path, int]) -> None:
        slot, limits = Slot(reference), self.settings.limits
        with self.launches.open(slot) as worker:
            arguments = {**self.launches.load_arguments(slot), "slowdown": 0.0}
            worker.ask("load", limits.load, **arguments)
            for path, seed in missing.items():
                examined = worker.ask("round", limits.first_round, seed=seed)["image"]
                wrong = images.wrong(examined, "full", arguments["device"])
                if wrong:
                    raise WorkerError("wrong_picture", f"the reference itself is wrong: {wrong}")
                worker.ask("write_reference", 60.0, path=str(path))


def _first_round(configuration: Configuration) -> list[int]:
    return images.image_seeds(configuration, configuration.seed)


# --- watching


class Watch:
    """Telemetry around a round; use as `with watch(pid) as watched`."""

    def __init__(self, gpu):
        self.monitor, self.seen = Monitor(gpu), set()
        self.telemetry, self.invalid = None, None

    @contextlib.contextmanager
    def __call__(self, pid: int):
        self.seen.add(pid)  # one that has just ended may be listed a moment longer
        self.telemetry, self.invalid = None, None
        self.monitor.start(self.seen)
        try:
            yield self
        finally:
            telemetry = self.monitor.stop()
            self.telemetry, self.invalid = telemetry.as_dict(), invalid_reason(telemetry)


@dataclass
class _Unwatched:
    telemetry = None
    invalid = None


@contextlib.contextmanager
def no_watch(pid: int):
    """Where there is no telemetry every round is valid."""
    yield _Unwatched()


# --- the journal


def _open_journal(settings: Settings, plan: Plan, facts: dict, say):
    folder = settings.folder / "journal"
    wanted = {
        **plan.as_dict(),
        "clock": settings.clock,
        "threads": settings.threads,
        "isolated": settings.isolated,
        "slowdown": settings.slowdown,
        "against": settings.against[0] if settings.against else None,
        "stack": {key: facts[key] for key in ("name", "uuid", "driver", "torch")},
    }
    if not settings.resume:
        path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}.jsonl"
        book = journal.Journal(path, wanted)
        journal.prune(folder)
        return book, Measurements(plan)
    path = journal.newest(folder)
    if path is None:
        raise SessionError(f"--perf-resume: there is no journal in {folder}; start without it")
    recorded = journal.read(path)
    if recorded.damage:
        say(f"{path}: {recorded.damage}")
    if recorded.ended:
        say(f"{path}: that session had come to its end; nothing is left to measure")
    for key, value in wanted.items():
        if recorded.plan.get(key) != json.loads(json.dumps(value)):
            raise SessionError(
                f"--perf-resume: {path} was started with other {key}: {recorded.plan.get(key)!r}, now {value!r}; "
                f"give the same options as then, or start again without --perf-resume"
            )
    try:
        measurements = Measurements(plan, recorded.events)
    except (KeyError, TypeError, ValueError) as error:
        raise SessionError(f"{path}: cannot be gone on from ({error}); start again without --perf-resume") from None
    say(f"perf: going on from {path}: {measurements.counts()[1]} rounds are there")
    return journal.Journal(path, after=recorded), measurements
