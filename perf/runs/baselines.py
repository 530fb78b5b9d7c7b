"""Baselines: which stored sessions a new one may be judged against, and the judgement. Needs neither torch nor pytest."""

from __future__ import annotations

import itertools
import os
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from perf.analysis.statistics import MIN_SESSIONS, Interval, margin
from perf.analysis.verdicts import REASONS, Decision, Verdict, decide_against_history, ratio_of_sessions
from perf.runs.saved_run import IDENTITY, BaselineError, SavedBenchmark, SavedRun, identity, parse, read, shown

__all__ = [
    "BaselineError",
    "Choice",
    "Judgement",
    "SavedBenchmark",
    "SavedRun",
    "candidates",
    "judge",
    "judge_foreign",
    "parse",
    "read",
    "why_foreign",
]
NUMBERED = re.compile(r"(\d{4,})_.*\.json")


@dataclass(frozen=True)
class Choice:
    """The stored sessions that a new one may be judged against, oldest first, and the files refused with their reasons."""

    history: tuple[SavedRun, ...] = ()
    refused: tuple[tuple[Path, str], ...] = ()
    named: SavedRun | None = None  # the one that the user asked for, which need not be a candidate

    @property
    def newest(self) -> SavedRun | None:
        """The session that a ratio to one session refers to."""
        return self.named or (self.history[-1] if self.history else None)

    @property
    def sessions(self) -> tuple[SavedRun, ...]:
        """The history with the named one at its end."""
        if self.named is None:
            return self.history
        return (*(run for run in self.history if run.path != self.named.path), self.named)

    @property
    def margin(self) -> float:
        """The margin, a fraction, from the A/A ratios of all these sessions."""
        return margin([ratio for run in self.history for ratio in run.aa_ratios])


@dataclass(frozen=True)
class Judgement:
    """A decision per id; `missing` configurations have a baseline but were not measured, `new` ids the reverse."""

    decisions: Mapping[str, Decision]
    missing: tuple[str, ...] = ()
    new: tuple[str, ...] = ()


def why_foreign(saved: Mapping[str, object], here: Mapping[str, object]) -> str | None:
    """What differs between two machines, by the keys of IDENTITY; None if nothing.

    Takes the facts of `machine_info.stack`, with `clock`, `threads` and `isolated` of the session beside them.
    """
    one, other = identity(saved), identity(here)
    differences = [f"{key} {_fact(one[key])}, here {_fact(other[key])}" for key in IDENTITY if one[key] != other[key]]
    return "; ".join(differences) or None


def _fact(value: object) -> str:
    if value is None:
        return "unknown"
    return f"{value:g}" if isinstance(value, float) else str(value)


def candidates(
    folder: str | os.PathLike[str],
    stack: Mapping[str, object],
    clock: str,
    threads: int | None,
    isolated: bool = True,
) -> Choice:
    """The runs `NNNN_*.json` under `folder`, at any depth, that a session of this machine may be judged against.

    Refused, each with its reason: damaged files, plain, partial, invalid and regressed runs, other machines. No folder is
    no history; raises BaselineError for a folder that cannot be listed.
    """
    here = {**stack, "clock": clock, "threads": threads, "isolated": isolated}
    history, refused = [], []
    for path in _numbered_files(Path(folder)):
        try:
            run = read(path)
        except BaselineError as error:
            refused.append((path, str(error).removeprefix(f"{shown(path)}: ")))
            continue
        foreign = why_foreign(run.machine, here)
        reason = run.why_no_candidate or (foreign and f"foreign: {foreign}")
        if reason:
            refused.append((path, reason))
        else:
            history.append(run)
    # The clock first: a moved or merged storage keeps its order. The number settles what was started in one second.
    history.sort(key=lambda run: (run.started_unix_seconds or 0.0, run.path.name))
    # A copy, or a session that was saved again by --perf-resume, is no second session: the spread would shrink to nothing.
    for one, other in itertools.pairwise(history):
        if one.started_unix_seconds is not None and one.started_unix_seconds == other.started_unix_seconds:
            refused.append((one.path, f"the same session as {other.path.name}"))
    again = {path for path, _ in refused}
    return Choice(tuple(run for run in history if run.path not in again), tuple(refused))


def _numbered_files(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        if Path(error.filename) == folder and isinstance(error, FileNotFoundError):
            return
        reason = f"cannot be listed: {error.strerror}; check the path and its rights"
        raise BaselineError(f"{shown(Path(error.filename))}: {reason}") from None

    return sorted(
        Path(place) / name
        for place, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if NUMBERED.fullmatch(name)
    )


def judge(current: SavedRun, baseline: SavedRun | Choice, margin: float) -> Judgement:
    """Judge every configuration of a session against stored sessions, or one stored run; `margin` is a fraction.

    From 6 stored sessions of a configuration a verdict rests on their prediction interval; under 6 it is INCONCLUSIVE,
    with the ratio to the newest. Where one was named the ratio is to that one, and the others say how much sessions
    differ. A session that is invalid has INVALID verdicts only. Whether the machines are alike is for the caller to ask
    (`why_foreign`): `candidates` has done so.
    """
    choice = baseline if isinstance(baseline, Choice) else Choice((baseline,))
    history = choice.sessions
    known = {id for run in history for id in run.by_id}
    measured = current.by_id
    return Judgement(
        {id: _decide(current, benchmark, choice, margin) for id, benchmark in measured.items()},
        missing=_missing(history[-1], current) if history else (),
        new=tuple(id for id in measured if id not in known),
    )


def judge_foreign(current: SavedRun, baseline: SavedRun) -> Judgement:
    """Plain ratios of the sessions' medians between two machines, for looking at: every verdict is INCONCLUSIVE."""
    ours, theirs = current.by_id, baseline.by_id
    return Judgement(
        {
            id: Decision(
                Verdict.INCONCLUSIVE,
                "foreign_machine",
                Interval.point(ours[id].session_median / theirs[id].session_median) if id in theirs else None,
                against=baseline.name,
            )
            for id in ours
        },
        missing=_missing(baseline, current),
        new=tuple(id for id in ours if id not in theirs),
    )


def _missing(baseline: SavedRun, current: SavedRun) -> tuple[str, ...]:
    """Configurations alone: other benchmarks of a file, such as the harness's overhead, are no part of a session."""
    return tuple(id for id, one in baseline.by_id.items() if one.configuration and id not in current.by_id)


def _decide(current: SavedRun, benchmark: SavedBenchmark, choice: Choice, margin: float) -> Decision:
    if current.invalid:
        return Decision(Verdict.INVALID, _coded("invalid_session", current.invalid))
    if benchmark.image_failure:
        return Decision(Verdict.INVALID, _coded("wrong_image", benchmark.image_failure))
    past = [(run, run.by_id[benchmark.id]) for run in choice.sessions if benchmark.id in run.by_id]
    past = [(run, old) for run, old in past if not old.image_failure]
    if not past:
        return Decision(Verdict.INCONCLUSIVE, "no_baseline", margin=margin)
    against = past[-1][0].name
    past = [(run, old) for run, old in past if _same_work(benchmark.configuration, old.configuration)]
    if not past:
        return Decision(Verdict.INCONCLUSIVE, "other_configuration", margin=margin, against=against)
    newest, old = past[-1]
    if newest.invalid:
        return Decision(Verdict.INVALID, f"invalid_baseline {newest.invalid}", against=newest.name)
    anchored = [
        (run, stored.anchored_launch_medians)
        for run, stored in past
        if run.anchor_name == current.anchor_name and stored.anchored_launch_medians
    ]
    seed = f"{benchmark.id} {current.name} {newest.name}"
    if not anchored or not benchmark.anchored_launch_medians:
        ratio = ratio_of_sessions(benchmark.launch_medians, old.launch_medians, seed)
        return Decision(Verdict.INCONCLUSIVE, "no_anchor", ratio, margin, newest.name)
    last, launches = anchored[-1]
    # A run that could not have been chosen, such as one that regressed, says nothing about sessions without a change.
    spread = [
        statistics.median(values) for run, values in anchored if run is not choice.named or not run.why_no_candidate
    ]
    if len(spread) < MIN_SESSIONS:
        ratio = ratio_of_sessions(benchmark.anchored_launch_medians, launches, seed)
        return Decision(Verdict.INCONCLUSIVE, "too_few_sessions", ratio, margin, last.name)
    ours = statistics.median(benchmark.anchored_launch_medians)
    base = statistics.median(launches) if last is choice.named else None
    return decide_against_history(ours, spread, margin, last.name, base)


def _coded(code: str, detail: str) -> str:
    """A reason read from a file: as it is if it has a code of ours, else under `code`."""
    return detail if detail.partition(" ")[0] in REASONS else f"{code} {detail}"


def _same_work(one: Mapping[str, object] | None, other: Mapping[str, object] | None) -> bool:
    """Whether all fields agree that both have: one added since did not exist, so that it cannot have differed."""
    if one is None or other is None:
        return one is other
    return all(one[key] == other[key] for key in one.keys() & other.keys())
