"""Start the journal of a session, or resume the one whose plan matches."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perf.session.journal import Journal, JournalError, Recorded, prune, read
from perf.session.loading import DESCRIPTIONS
from perf.session.measurements import TRANSIENT_FAILURES, Measurements
from perf.session.plan import Plan
from perf.session.settings import SessionError, SessionRefused


@dataclass(frozen=True)
class OpenJournal:
    """A journal open for writing, with the measurements already in it."""

    journal: Journal
    measurements: Measurements
    started_unix_seconds: float  # of the interrupted session where one is resumed


def start_journal(folder: Path, plan: Plan, protocol: dict[str, Any], started: float) -> OpenJournal:
    """Create a journal, and delete all but the newest few of complete sessions in its folder. Raises JournalError.

    protocol: the plan and options that a resumed session must repeat. started: Unix seconds.
    """
    ns = time.time_ns()
    # In UTC, so that the newest journal is the last by name even when daylight saving time ends.
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(ns // 10**9))}-{ns % 10**9:09d}.jsonl"
    # Drawn for this session, and so no option that a resumed one must repeat.
    drawn = {"order_seed": plan.seed, "loading": plan.loading}
    journal = Journal(path, {**protocol, **drawn, "started_unix_seconds": started})
    prune(folder)
    return OpenJournal(journal, Measurements(plan), started)


def resume_journal(
    folder: Path,
    plan: Plan,
    protocol: dict[str, Any],
    log: Callable[[str], None],
    name: str | None = None,
    loading: str | None = None,
) -> OpenJournal:
    """Open the journal of a session with this plan and read its rounds.

    name: of the journal, or its unique beginning; without it the newest unfinished session with the same plan and
    options is resumed, else the newest complete one. loading: that the session must have had, None for any.
    Raises SessionError if there is none, SessionRefused for another loading, JournalError if unreadable.
    """
    recorded = read(named(folder, name)) if name else _matching(folder, protocol, log)
    path = recorded.path
    if recorded.damage:
        log(f"{path}: {recorded.damage}")
    _require_same_options(path, recorded.plan, protocol)
    plan = _drawn_before(path, recorded.plan, plan)
    if loading not in (None, plan.loading):
        raise SessionRefused(
            f"--perf-loading {loading}: the session to resume began with {plan.loading}, and its rounds must alternate as "
            "before: leave it out, or start again without --perf-resume"
        )
    try:
        measurements = Measurements(plan, recorded.events)
    except (KeyError, TypeError, ValueError) as error:
        raise SessionError(f"{path}: cannot be resumed ({error}); start again without --perf-resume") from None
    failed = {event["slot"] for event in recorded.events if event["event"] == "failure"}
    again = [name for name in failed if measurements.by_name[name].failure is None]
    if recorded.ended and not again:
        log(f"{path}: the session was complete; nothing is left to measure")
    log(f"perf: resuming from {path} with {measurements.counts()[1]} measured rounds")
    for name in sorted(failed.difference(again)):
        kind, message = measurements.by_name[name].failure or ("", "")
        if kind in TRANSIENT_FAILURES:
            log(
                f"perf: {name} is not tried again ({kind}: {message}): its rounds would not alternate with those of the "
                "others; measure it in a new session"
            )
    started, now = recorded.plan.get("started_unix_seconds"), time.time()
    if not isinstance(started, float) or not 0 < started <= now:
        started = now
    return OpenJournal(Journal(path, after=recorded), measurements, started)


def _drawn_before(path: Path, recorded: dict[str, Any], plan: Plan) -> Plan:
    """The plan with the order and the loading of the interrupted session."""
    seed, loading = recorded.get("order_seed"), recorded.get("loading")
    if not isinstance(seed, int) or loading not in DESCRIPTIONS:
        raise SessionError(f"{path}: has no order of rounds; start again without --perf-resume")
    return replace(plan, seed=seed, loading=loading)


def named(folder: Path, name: str) -> Path:
    """The journal in a folder, at any depth, whose name begins with `name`. Raises SessionError unless there is one."""
    paths = [path for path in sorted(folder.rglob("*.jsonl")) if path.stem.startswith(name.removesuffix(".jsonl"))]
    if len(paths) == 1:
        return paths[0]
    known = ", ".join(path.stem for path in paths or sorted(folder.rglob("*.jsonl"))) or "none"
    problem = "several sessions have" if paths else "no session has"
    raise SessionError(f"{problem} the name {name} in {folder}; there are: {known}")


def _matching(folder: Path, protocol: dict[str, Any], log: Callable[[str], None]) -> Recorded:
    """The newest unfinished session with this protocol, else the newest complete one, else the newest of all.

    The last has other options, which `_require_same_options` reports. An unreadable journal is skipped with a message,
    unless there is no other.
    """
    readable, unreadable = [], []
    for path in sorted(folder.glob("*.jsonl"), reverse=True):
        try:
            readable.append(read(path))
        except JournalError as error:
            unreadable.append(error)
    if not readable:
        raise (
            unreadable[0]
            if unreadable
            else SessionError(f"--perf-resume: there is no journal in {folder}; start without it")
        )
    for error in unreadable:
        log(f"not resumed: {error}")
    same = [recorded for recorded in readable if not _difference(recorded.plan, protocol)]
    unfinished = [recorded for recorded in same if not recorded.ended]
    # One without a round, such as of a command that was interrupted while it compiled, comes after those with rounds.
    candidates = sorted(unfinished, key=lambda recorded: not recorded.rounds) or same or readable
    for other in candidates[1:] if same else ():
        if not other.ended:
            log(f"perf: also unfinished with the same options: {other}")
    return candidates[0]


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first key whose value differs, or None."""
    return next((key for key, value in json.loads(json.dumps(now)).items() if before.get(key) != value), None)


def _require_same_options(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    key = _difference(before, now)
    if key is None:
        return
    earlier, value = before.get(key), json.loads(json.dumps(now))[key]
    if key == "configurations" and earlier:  # as many and of the same ids, or `slots` would have differed
        earlier, value = next(_differing(*pair) for pair in zip(earlier, value) if pair[0] != pair[1])
    raise SessionError(
        f"--perf-resume: {path} was started with other {key}: {earlier!r}, now {value!r}; "
        f"give the same options, or start again without --perf-resume"
    )


def _differing(before: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return {key: before.get(key) for key in keys}, {key: now.get(key) for key in keys}
