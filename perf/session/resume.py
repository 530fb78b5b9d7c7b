"""Start the journal of a session, or resume the newest one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.session.journal import Journal, newest, prune, read
from perf.session.measurements import Measurements
from perf.session.plan import Plan
from perf.session.settings import SessionError


@dataclass(frozen=True)
class OpenJournal:
    """A journal open for writing, with the measurements already in it."""

    journal: Journal
    measurements: Measurements
    started_unix_seconds: float  # of the interrupted session where one is resumed


def start_journal(folder: Path, plan: Plan, protocol: dict[str, Any], started: float) -> OpenJournal:
    """Create a journal, and delete all but the newest few in its folder. Raises JournalError.

    protocol: the plan and options that a resumed session must repeat. started: Unix seconds.
    """
    ns = time.time_ns()
    # In UTC, so that the newest journal is the last by name even when daylight saving time ends.
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(ns // 10**9))}-{ns % 10**9:09d}.jsonl"
    journal = Journal(path, {**protocol, "started_unix_seconds": started})
    prune(folder)
    return OpenJournal(journal, Measurements(plan), started)


def resume_journal(folder: Path, plan: Plan, protocol: dict[str, Any], log: Callable[[str], None]) -> OpenJournal:
    """Open the newest journal and read its rounds. Raises SessionError for other options, JournalError if unreadable."""
    path = newest(folder)
    if path is None:
        raise SessionError(f"--perf-resume: there is no journal in {folder}; start without it")
    recorded = read(path)
    if recorded.damage:
        log(f"{path}: {recorded.damage}")
    if recorded.ended:
        log(f"{path}: the session was complete; nothing is left to measure")
    _require_same_options(path, recorded.plan, protocol)
    try:
        measurements = Measurements(plan, recorded.events)
    except (KeyError, TypeError, ValueError) as error:
        raise SessionError(f"{path}: cannot be resumed ({error}); start again without --perf-resume") from None
    log(f"perf: resuming from {path} with {measurements.counts()[1]} measured rounds")
    started, now = recorded.plan.get("started_unix_seconds"), time.time()
    if not isinstance(started, float) or not 0 < started <= now:
        started = now
    return OpenJournal(Journal(path, after=recorded), measurements, started)


def _require_same_options(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, value in json.loads(json.dumps(now)).items():
        earlier = before.get(key)
        if earlier == value:
            continue
        if key == "configurations" and earlier:  # as many and of the same ids, or `slots` would have differed
            earlier, value = next(_differing(*pair) for pair in zip(earlier, value) if pair[0] != pair[1])
        raise SessionError(
            f"--perf-resume: {path} was started with other {key}: {earlier!r}, now {value!r}; "
            f"give the same options, or start again without --perf-resume"
        )


def _differing(before: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return {key: before.get(key) for key in keys}, {key: now.get(key) for key in keys}
