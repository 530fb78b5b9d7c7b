"""`python -m perf battery`: measure the false alarms and misses of the regression gate on this machine.

Each session measures one configuration under five labels: unchanged, unchanged again (A/A), with a busy loop in its sampler
that slows it by a known fraction, with a smaller one, and the control arm. It runs the code of `--perf-against`: the same
loading, order, looks and rules. A difference between the first two is a false alarm; the third must be SLOWER. Sessions are
appended to a file as they end, so an interrupted battery can be resumed. `--simulate` judges recorded launches drawn again
instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from perf.analysis.paired import LOOKS, MIN_LAUNCHES, launch_effects
from perf.analysis.statistics import MARGIN_FLOOR
from perf.analysis.verdicts import Decision, ExitCode, Verdict, decide_looks
from perf.commands import simulate
from perf.commands.interference import KINDS, interference
from perf.configurations.configuration import Configuration, UnknownChoice, usual
from perf.launch.process import ROOT
from perf.machine.facts import cpu_facts
from perf.machine.nvml import NoTelemetry, open_visible_device
from perf.machine.stack import stack
from perf.machine.telemetry import Watch, no_watch
from perf.runs.baselines import why_foreign
from perf.runs.fingerprints import source_sha256
from perf.runs.storage import why_unwritable, write_atomically
from perf.session import loading, pairs
from perf.session.lock import DeviceBusy, DeviceLock
from perf.session.measurements import Measurements, paired_rounds
from perf.session.pairs import Judge, Pair
from perf.session.plan import CONTROL, Plan, Slot
from perf.session.run import free_bytes, ignore_pid
from perf.session.runner import Runner
from perf.session.settings import Settings
from perf.session.workers import Launches, compile_cache
from perf.worker.wire import WorkerError

SLOWDOWNS = (0.05, 0.03)
SIMULATED_CHANGES = (0.0, 0.02, 0.03, 0.05)
MOST_ALARMS, MOST_INVALID, LEAST_DETECTED = 1 / 40, 1 / 40, 0.95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--sessions", type=int, default=40, help="number of A/A and of slowdown comparisons (default: 40)")
    looks = ", ".join(map(str, LOOKS))
    add("--launches", type=int, help=f"fresh processes per label (default: looks after {looks}, as the gate)")
    add("--rounds", type=int, help="timed rounds per launch (default: as the gate)")
    help = "an injected fraction; several may be given, and the largest must be detected (default: 0.05 and 0.03)"
    add("--slowdown", type=float, action="append", help=help)
    add("--interference", choices=KINDS, default="none", help="load on every core beside the sessions (default: none)")
    add("--model", default="tiny", help="model preset (default: tiny)")
    add("--attention", default="sdpa", help="attention implementation (default: sdpa)")
    add("--steps", type=int, default=10, help="sampler steps (default: 10)")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--output", type=Path, help="JSON file of sessions; resumed if it exists")
    help = "measure nothing: rates from the launches of this file, drawn again"
    group.add_argument("--simulate", type=Path, metavar="SAVED.json", help=help)
    add("--draws", type=int, default=10_000, help="simulated comparisons of each change (default: 10000)")


def run(arguments: argparse.Namespace) -> int:
    """Run the missing sessions and print the rates.

    Exit status: 0; 1 if more than 1 in 40 A/A comparisons are false alarms, more than 1 in 40 sessions are INVALID, or
    the largest slowdown is detected in fewer than 95 % of its comparisons; 4 for a usage error.
    """
    try:
        configuration = _configuration(arguments)
        if arguments.simulate:
            print(_simulated(arguments))
            return ExitCode.OK
    except (UnknownChoice, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.REFUSED
    if reason := why_unwritable(arguments.output):
        print(f"error: {arguments.output} {reason}; name another file", file=sys.stderr)
        return ExitCode.REFUSED
    gpu = open_visible_device()
    device, clock, threads = ("cpu", "cpu", 1) if isinstance(gpu, NoTelemetry) else ("cuda", "wall", None)
    facts, looks, slowdowns = stack(device, gpu), _looks(arguments), _slowdowns(arguments)
    rounds, most_rounds = pairs.rounds_of(arguments.rounds, device, paired=True)
    protocol = {"looks": list(looks), "rounds": rounds, "most_rounds": most_rounds, "slowdowns": list(slowdowns)}
    header = {"schema": 2, "configuration": configuration.as_dict(), "clock": clock, "stack": facts, **protocol}
    header["interference"] = arguments.interference
    header["source"] = {name: source_sha256(ROOT / name) for name in ("sd", "perf")}
    settings = Settings(
        device,
        arguments.output.parent,
        clock=clock,
        threads=threads,
        launches=looks[0],
        looks=looks,
        rounds=rounds,
        most_rounds=most_rounds,
    )
    try:
        sessions = _earlier(arguments.output, header)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.REFUSED
    try:
        with DeviceLock(facts["uuid"] or device), compile_cache() as cache:
            watch = no_watch if isinstance(gpu, NoTelemetry) else Watch(gpu)
            while len(sessions) < arguments.sessions:
                with interference(arguments.interference, len(sessions)):
                    launches = Launches(settings, cache)
                    sessions.append(measure_session(settings, slowdowns, configuration, launches, watch, gpu))
                write_atomically(arguments.output, {**header, "sessions": sessions})
                summary = _summary(sessions[-1], looks, slowdowns)
                print(f"{len(sessions)}/{arguments.sessions}: {summary}", flush=True)
    except (DeviceBusy, ValueError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.FAILED
    return report(sessions, looks, slowdowns)


def _slowdowns(arguments: argparse.Namespace) -> tuple[float, ...]:
    return tuple(sorted(set(arguments.slowdown or SLOWDOWNS), reverse=True))


def label_of(slowdown: float) -> str:
    """The label of the arm with an injected slowdown, a fraction."""
    return f"slow{100 * slowdown:g}"


def _looks(arguments: argparse.Namespace) -> tuple[int, ...]:
    return pairs.looks_of(arguments.launches, paired=True) or (arguments.launches,)


def _configuration(arguments: argparse.Namespace) -> Configuration:
    """The configuration to measure. Raises UnknownChoice or ValueError for arguments that cannot work."""
    few = arguments.launches is not None and arguments.launches < MIN_LAUNCHES
    if few or arguments.sessions < 1 or arguments.draws < 1:
        raise ValueError(f"at least {MIN_LAUNCHES} launches, without which there is no interval, 1 session and 1 draw")
    no_round = arguments.rounds is not None and arguments.rounds < 1
    if no_round or not all(0 < slowdown < 1 for slowdown in _slowdowns(arguments)):
        raise ValueError("at least 1 round, and slowdowns between 0 and 1")
    return replace(usual(arguments.model), attention=arguments.attention, steps=arguments.steps)


def _simulated(arguments: argparse.Namespace) -> str:
    """The rates of recorded sessions drawn again. Raises ValueError for a file that is no battery."""
    sessions = _document(arguments.simulate)["sessions"]
    try:
        return simulate.table(sessions, SIMULATED_CHANGES, _looks(arguments), MARGIN_FLOOR, arguments.draws)
    except (KeyError, TypeError):
        raise ValueError(f"{arguments.simulate}: has sessions without rounds; name another file") from None


def _earlier(path: Path, header: dict) -> list[dict]:
    """The sessions of an interrupted battery. Raises ValueError for another file, machine, software or options."""
    if not path.exists():
        return []
    document = _document(path)
    different = [key for key in header if document.get(key) != header[key] and key != "stack"]
    if different:
        raise ValueError(f"{path}: is a battery with other {', '.join(different)}; name another file")
    if reason := why_foreign(document.get("stack") or {}, header["stack"]):
        raise ValueError(f"{path}: has sessions of another machine or software ({reason}); name another file")
    return document["sessions"]


def _document(path: Path) -> dict:
    """The content of a battery's file. Raises ValueError for any other file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        list(document["sessions"])
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{path}: is no battery; name another file") from None
    return document


def measure_session(
    settings: Settings, slowdowns: Sequence[float], configuration: Configuration, launches: Launches, watch, gpu
) -> dict:
    """Measure the labels as the gate does. Raises WorkerError if one of them cannot be measured."""
    begin = time.monotonic()
    slowed = {label_of(slowdown): slowdown for slowdown in slowdowns}
    slots = tuple(Slot(configuration, label) for label in (None, "aa", *slowed, CONTROL))
    choice, _ = loading.choose(slots, free_bytes(settings, gpu), "memory")
    looks = settings.looks if len(settings.looks) > 1 else ()
    plan = Plan(slots, settings.launches, settings.rounds, choice, random.randrange(2**32), looks, settings.most_rounds)
    measurements = Measurements(plan)
    runner = Runner(
        plan,
        open_launch=launches.open,
        load=lambda slot: {**launches.load_arguments(slot), "slowdown": slowed.get(slot.variant, 0.0)},
        references=lambda slot, seed: None,
        watch=watch,
        write=lambda event, content: None,
        progress=lambda launch, slot, round_number: None,
        loaded=watch.worker_pids.add if isinstance(watch, Watch) else ignore_pid,
        loads_at_once=loading.at_once(settings.threads, cpu_facts()),
    )
    id = configuration.id
    judge = Judge(plan, [Pair(label, f"{id}@{label}", id, label) for label in ("aa", *slowed)], settings.margin)
    pairs.measure(runner, measurements, judge, lambda line: None)
    for slot in plan.slots:
        failure = measurements.by_name[slot.name].failure
        if failure:
            raise WorkerError(*failure)
    return {
        "rounds": {slot.variant or "plain": _rounds(measurements, slot.name, id) for slot in slots},
        "drift": measurements.drift(),
        "invalid": judge.invalid(measurements),
        "order_seed": plan.seed,
        "seconds": time.monotonic() - begin,
    }


def _rounds(measurements: Measurements, name: str, plain: str) -> list[list[float]]:
    """Seconds by launch and cycle, of the rounds that are valid under this label and unchanged."""
    return paired_rounds(measurements.by_name[name], measurements.by_name[plain])[0]


def judge_session(
    session: dict, looks: tuple[int, ...], slowdowns: Sequence[float], margin: float
) -> tuple[Decision, list[Decision]]:
    """(verdict of the A/A comparison, verdict of each injected slowdown)."""
    if session.get("invalid"):
        invalid = Decision(Verdict.INVALID, session["invalid"])
        return invalid, [invalid] * len(slowdowns)
    rounds = session["rounds"]

    def decide(label: str, against: str) -> Decision:
        return decide_looks(launch_effects(rounds[label], rounds["plain"]), margin, looks, against)[0]

    slowed = [decide(label_of(slowdown), f"slowed by {100 * slowdown:g} %") for slowdown in slowdowns]
    return decide("aa", "itself"), slowed


def _summary(session: dict, looks: tuple[int, ...], slowdowns: Sequence[float]) -> str:
    same, slowed = judge_session(session, looks, slowdowns, MARGIN_FLOOR)
    drift = 100 * (session["drift"] or 0)
    return f"A/A {same}; {'; '.join(map(str, slowed))}; drift {drift:.1f} %; {session['seconds']:.0f} s"


def report(sessions: list[dict], looks: tuple[int, ...], slowdowns: Sequence[float]) -> int:
    """Print the rates at the smallest margin; returns the exit status. slowdowns: the largest first."""
    decisions = [judge_session(session, looks, slowdowns, MARGIN_FLOOR) for session in sessions]
    count = len(sessions)
    alarms = sum(same.verdict in (Verdict.SLOWER, Verdict.FASTER) for same, _ in decisions)
    invalid = sum(same.verdict is Verdict.INVALID for same, _ in decisions)
    detected = [sum(slowed[i].verdict is Verdict.SLOWER for _, slowed in decisions) for i in range(len(slowdowns))]
    rates = [f"{100 * slow:g} % slowdown detected in {hits} of {count}" for slow, hits in zip(slowdowns, detected)]
    print(
        f"margin {100 * MARGIN_FLOOR:.2f} %: {alarms} false alarms in {count} A/A comparisons, "
        f"{', '.join(rates)}, {invalid} INVALID"
    )
    launches = [decision.launches for same, slowed in decisions for decision in (same, *slowed) if decision.launches]
    if launches:
        print(f"{statistics.median(launches):g} launches a comparison in the median, {max(launches)} at most")
    times = [session["seconds"] for session in sessions if session.get("seconds")]
    if times:
        print(f"{statistics.median(times):.0f} s a session in the median, {max(times):.0f} s at most")
    alone = [
        seconds for session in sessions if session.get("seconds") for seconds in _comparison_seconds(session, looks)
    ]
    if alone:
        print(f"about {statistics.median(alone):.0f} s a comparison in the median, {max(alone):.0f} s at most")
    failed = alarms > max(1, MOST_ALARMS * count) or invalid > max(1, MOST_INVALID * count)
    return ExitCode.FAILED if failed or detected[0] < LEAST_DETECTED * count else ExitCode.OK


def _comparison_seconds(session: dict, looks: tuple[int, ...]) -> Iterator[float]:
    """Yield the seconds that each comparison of a session would take alone: two labels and the control arm, all launches alike.

    A label whose comparison is decided has no rounds in further launches.
    """
    rounds = session["rounds"]
    made = sum(map(bool, itertools.chain.from_iterable(rounds.values())))
    for label in rounds.keys() - {"plain", CONTROL}:
        decision, _ = decide_looks(launch_effects(rounds[label], rounds["plain"]), MARGIN_FLOOR, looks)
        if decision.launches:
            yield 3 * session["seconds"] / made * decision.launches
