"""`python -m perf battery`: does the gate work on this machine? Measured, not assumed.

Each session measures one configuration under three labels in turns: as it is, as it is once more, and with a busy loop
inside its sampler that makes it slower by a known fraction. The first two must never be told apart (a false alarm), and the
third must be found SLOWER. Sessions are added to a file as they end, so that a long battery can be stopped and gone on with.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from perf.analysis.statistics import MARGIN_FLOOR, MIN_VALUES, self_comparison
from perf.analysis.verdicts import Decision, ExitCode, Verdict, decide_paired
from perf.configurations.configuration import Configuration, UnknownChoice, usual
from perf.machine.nvml import NoTelemetry, open_visible_device
from perf.machine.stack import stack
from perf.machine.telemetry import Watch, no_watch
from perf.runs.storage import write_atomically
from perf.session.lock import DeviceBusy, DeviceLock
from perf.session.measurements import Measurements
from perf.session.plan import Plan, Slot
from perf.session.runner import Runner
from perf.session.settings import Settings
from perf.session.workers import Launches, compile_cache
from perf.worker.wire import WorkerError

LABELS = (None, "aa", "slow")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--sessions", type=int, default=30, help="comparisons of each kind (default: 30)")
    parser.add_argument("--launches", type=int, default=10, help="fresh processes per label (default: 10)")
    parser.add_argument("--rounds", type=int, default=8, help="timed rounds per launch (default: 8)")
    parser.add_argument("--slowdown", type=float, default=0.05, help="the injected fraction (default: 0.05)")
    parser.add_argument("--model", default="tiny", help="model preset (default: tiny)")
    parser.add_argument("--attention", default="sdpa", help="attention implementation (default: sdpa)")
    parser.add_argument("--steps", type=int, default=10, help="sampler steps (default: 10)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of sessions; gone on with if it exists")


def run(arguments: argparse.Namespace) -> int:
    """Run the missing sessions and print the rates; 1 when the gate fails: false alarms in over 1 of 30, misses in over 3."""
    if arguments.launches < MIN_VALUES or arguments.sessions < 1:
        print(
            f"error: at least {MIN_VALUES} launches, without which there is no interval, and 1 session", file=sys.stderr
        )
        return ExitCode.REFUSED
    if arguments.rounds < 1 or not 0 < arguments.slowdown < 1:
        print("error: at least 1 round, and a slowdown between 0 and 1", file=sys.stderr)
        return ExitCode.REFUSED
    try:
        configuration = replace(usual(arguments.model), attention=arguments.attention, steps=arguments.steps)
    except UnknownChoice as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.REFUSED
    gpu = open_visible_device()
    device = "cpu" if isinstance(gpu, NoTelemetry) else "cuda"
    clock = "wall" if device == "cuda" else "cpu"
    facts = stack(device, gpu)
    protocol = {name: getattr(arguments, name) for name in ("launches", "rounds", "slowdown")}
    header = {"schema": 1, "configuration": configuration.as_dict(), "clock": clock, "stack": facts, **protocol}
    settings = Settings(
        device,
        arguments.output.parent,
        clock=clock,
        threads=1 if clock == "cpu" else None,
        launches=arguments.launches,
        rounds=arguments.rounds,
        slowdown=arguments.slowdown,
    )
    try:
        sessions = _earlier(arguments.output, header)
        with DeviceLock(facts["uuid"] or device), compile_cache() as cache:
            watch = no_watch if isinstance(gpu, NoTelemetry) else Watch(gpu)
            while len(sessions) < arguments.sessions:
                sessions.append(one_session(settings, configuration, Launches(settings, cache), watch))
                write_atomically(arguments.output, {**header, "sessions": sessions})
                print(f"{len(sessions)}/{arguments.sessions}: {_words(sessions[-1], settings.slowdown)}", flush=True)
    except (DeviceBusy, ValueError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.FAILED
    return report(sessions, arguments.slowdown)


def _earlier(path: Path, header: dict) -> list[dict]:
    """The sessions of an earlier battery of the same kind. Raises ValueError for another one's."""
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        different = [key for key in header if found.get(key) != header[key] and key != "stack"]
        sessions = found["sessions"]
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{path}: is no battery; name another file") from None
    if different:
        raise ValueError(f"{path}: is a battery with other {', '.join(different)}; name another file")
    return sessions


def one_session(settings: Settings, configuration: Configuration, launches: Launches, watch) -> dict:
    """Measure the three labels in turns. Raises WorkerError when one of them cannot be measured."""
    slots = tuple(Slot(configuration, label) for label in LABELS)
    plan = Plan(slots, settings.launches, settings.rounds, settings.side_by_side)
    measurements = Measurements(plan)
    runner = Runner(
        plan,
        open_launch=launches.open,
        load=lambda slot: {**launches.load_arguments(slot), "slowdown": settings.slowdown * (slot.variant == "slow")},
        references=lambda slot, seed: None,
        watch=watch,
        write=lambda event, content: None,
        progress=lambda launch, slot: None,
    )
    runner.run(measurements)
    medians, rounds = {}, {}
    for slot in plan.slots:
        measured = measurements.by_name[slot.name]
        if measured.failure:
            raise WorkerError(*measured.failure)
        medians[slot.variant or "plain"] = [measured.median(launch) for launch in range(plan.launches)]
        rounds[slot.variant or "plain"] = [
            [one["seconds"] for one in measured.launches[launch].valid()] for launch in range(plan.launches)
        ]
    return {"medians": medians, "rounds": rounds, "drift": measurements.drift()}


def judge(session: dict, slowdown: float, margin: float) -> tuple[Decision, Decision]:
    """(the verdict on no change, the verdict on the injected one)."""
    plain, again, slow = (session["medians"][label] for label in ("plain", "aa", "slow"))
    return decide_paired(plain, again, margin, "aa"), decide_paired(slow, plain, margin, f"slowed by {slowdown}")


def _words(session: dict, slowdown: float) -> str:
    same, slow = judge(session, slowdown, MARGIN_FLOOR)
    return f"A/A {same}; slowed {slow}; anchor moved {100 * (session['drift'] or 0):.1f} %"


def report(sessions: list[dict], slowdown: float) -> int:
    """Print the rates at the margin's floor, and at the margin that this machine's own noise sets."""
    ratios = [judge(session, slowdown, MARGIN_FLOOR)[0].ratio.estimate for session in sessions]
    noise = self_comparison(ratios).p95
    status = ExitCode.OK
    for margin in dict.fromkeys((MARGIN_FLOOR, max(MARGIN_FLOOR, noise))):
        decisions = [judge(session, slowdown, margin) for session in sessions]
        alarms = sum(same.verdict in (Verdict.SLOWER, Verdict.FASTER) for same, _ in decisions)
        found = sum(slow.verdict is Verdict.SLOWER for _, slow in decisions)
        print(
            f"margin {100 * margin:.2f} %: {alarms} false alarms in {len(sessions)} A/A comparisons, "
            f"{100 * slowdown:g} % slowdown found in {found} of {len(sessions)}"
        )
        if alarms > max(1, len(sessions) / 30) or found < 0.9 * len(sessions):
            status = ExitCode.FAILED
    print(f"A/A ratios differ from 1 by at most {100 * noise:.2f} % in 95 % of comparisons")
    return status
