"""`python -m perf battery`: measure the false alarms and misses of the regression gate on this machine.

Each session measures one configuration under three labels in turns: unchanged, unchanged again (A/A), and with a busy loop
in its sampler that slows it by a known fraction. A difference between the first two is a false alarm; the third must be
SLOWER. Sessions are appended to a file as they end, so an interrupted battery can be resumed.
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
from perf.runs.storage import why_unwritable, write_atomically
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
    add = parser.add_argument
    add("--sessions", type=int, default=30, help="number of A/A and of slowdown comparisons (default: 30)")
    add("--launches", type=int, default=10, help="fresh processes per label (default: 10)")
    add("--rounds", type=int, default=8, help="timed rounds per launch (default: 8)")
    add("--slowdown", type=float, default=0.05, help="the injected fraction (default: 0.05)")
    add("--model", default="tiny", help="model preset (default: tiny)")
    add("--attention", default="sdpa", help="attention implementation (default: sdpa)")
    add("--steps", type=int, default=10, help="sampler steps (default: 10)")
    add("--output", type=Path, required=True, help="JSON file of sessions; resumed if it exists")


def run(arguments: argparse.Namespace) -> int:
    """Run the missing sessions and print the rates.

    Exit status: 0; 1 if more than 1 in 30 A/A comparisons are false alarms or fewer than 90 % of the slowdowns are
    detected; 4 for a usage error.
    """
    try:
        configuration = _configuration(arguments)
    except (UnknownChoice, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.REFUSED
    if reason := why_unwritable(arguments.output):
        print(f"error: {arguments.output} {reason}; name another file", file=sys.stderr)
        return ExitCode.REFUSED
    gpu = open_visible_device()
    device, clock, threads = ("cpu", "cpu", 1) if isinstance(gpu, NoTelemetry) else ("cuda", "wall", None)
    facts = stack(device, gpu)
    protocol = {name: getattr(arguments, name) for name in ("launches", "rounds", "slowdown")}
    header = {"schema": 1, "configuration": configuration.as_dict(), "clock": clock, "stack": facts, **protocol}
    settings = Settings(device, arguments.output.parent, clock=clock, threads=threads, **protocol)
    try:
        sessions = _earlier(arguments.output, header)
        with DeviceLock(facts["uuid"] or device), compile_cache() as cache:
            watch = no_watch if isinstance(gpu, NoTelemetry) else Watch(gpu)
            while len(sessions) < arguments.sessions:
                sessions.append(measure_session(settings, configuration, Launches(settings, cache), watch))
                write_atomically(arguments.output, {**header, "sessions": sessions})
                print(f"{len(sessions)}/{arguments.sessions}: {_summary(sessions[-1], settings.slowdown)}", flush=True)
    except (DeviceBusy, ValueError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.FAILED
    return report(sessions, arguments.slowdown)


def _configuration(arguments: argparse.Namespace) -> Configuration:
    """The configuration to measure. Raises UnknownChoice or ValueError for arguments that cannot work."""
    if arguments.launches < MIN_VALUES or arguments.sessions < 1:
        raise ValueError(f"at least {MIN_VALUES} launches, without which there is no interval, and 1 session")
    if arguments.rounds < 1 or not 0 < arguments.slowdown < 1:
        raise ValueError("at least 1 round, and a slowdown between 0 and 1")
    return replace(usual(arguments.model), attention=arguments.attention, steps=arguments.steps)


def _earlier(path: Path, header: dict) -> list[dict]:
    """The sessions of an interrupted battery. Raises ValueError for another file or other options."""
    if not path.exists():
        return []
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        different = [key for key in header if document.get(key) != header[key] and key != "stack"]
        sessions = document["sessions"]
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{path}: is no battery; name another file") from None
    if different:
        raise ValueError(f"{path}: is a battery with other {', '.join(different)}; name another file")
    return sessions


def measure_session(settings: Settings, configuration: Configuration, launches: Launches, watch) -> dict:
    """Measure the three labels in turns. Raises WorkerError if one of them cannot be measured."""
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
        measured, label = measurements.by_name[slot.name], slot.variant or "plain"
        if measured.failure:
            raise WorkerError(*measured.failure)
        medians[label] = [measured.median(launch) for launch in range(plan.launches)]
        rounds[label] = [
            [round["seconds"] for round in measured.launches[launch].valid()] for launch in range(plan.launches)
        ]
    return {"medians": medians, "rounds": rounds, "drift": measurements.drift()}


def judge(session: dict, slowdown: float, margin: float) -> tuple[Decision, Decision]:
    """(verdict of the A/A comparison, verdict of the injected slowdown)."""
    plain, again, slow = (session["medians"][label] for label in ("plain", "aa", "slow"))
    return decide_paired(plain, again, margin, "aa"), decide_paired(slow, plain, margin, f"slowed by {slowdown}")


def _summary(session: dict, slowdown: float) -> str:
    same, slow = judge(session, slowdown, MARGIN_FLOOR)
    return f"A/A {same}; slowed {slow}; reference workload drift {100 * (session['drift'] or 0):.1f} %"


def report(sessions: list[dict], slowdown: float) -> int:
    """Print the rates at the smallest margin and at the margin of this machine's A/A noise; returns the exit status."""
    ratios = [judge(session, slowdown, MARGIN_FLOOR)[0].ratio.estimate for session in sessions]
    noise = self_comparison(ratios).p95
    status = ExitCode.OK
    for margin in dict.fromkeys((MARGIN_FLOOR, max(MARGIN_FLOOR, noise))):
        decisions = [judge(session, slowdown, margin) for session in sessions]
        alarms = sum(same.verdict in (Verdict.SLOWER, Verdict.FASTER) for same, _ in decisions)
        detected = sum(slow.verdict is Verdict.SLOWER for _, slow in decisions)
        print(
            f"margin {100 * margin:.2f} %: {alarms} false alarms in {len(sessions)} A/A comparisons, "
            f"{100 * slowdown:g} % slowdown detected in {detected} of {len(sessions)}"
        )
        if alarms > max(1, len(sessions) / 30) or detected < 0.9 * len(sessions):
            status = ExitCode.FAILED
    print(f"A/A ratios differ from 1 by at most {100 * noise:.2f} % in 95 % of comparisons")
    return status
