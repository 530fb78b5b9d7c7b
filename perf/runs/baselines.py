"""Baselines: selection of stored sessions for a comparison, and the comparison, without torch or pytest."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from perf.analysis.counts import CountsComparison, compare
from perf.analysis.statistics import MIN_SESSIONS, Interval, margin
from perf.analysis.verdicts import REASONS, Decision, Verdict, decide_against_history, ratio_of_sessions
from perf.runs.saved_run import IDENTITY, NUMBERED, BaselineError, SavedBenchmark, SavedRun, identity, read, shown


@dataclass(frozen=True)
class Choice:
    """The stored sessions of a comparison, oldest first, and the rejected files with their reasons.

    named: the run that the user named, whether or not it is in `history`; ratios then refer to it, and else to the mean of
    the history. plain: runs of this machine without a configuration, for pytest-benchmark's comparison. counted: complete
    runs with counts of the same software, on whatever machine, oldest first.
    """

    history: tuple[SavedRun, ...] = ()
    refused: tuple[tuple[Path, str], ...] = ()
    named: SavedRun | None = None
    plain: tuple[SavedRun, ...] = ()
    counted: tuple[SavedRun, ...] = ()

    def without(self, started_unix_seconds: float) -> Choice:
        """The choice without stored copies of the session that began then."""
        history, counted = (
            tuple(run for run in runs if run.started_unix_seconds != started_unix_seconds)
            for runs in (self.history, self.counted)
        )
        return replace(self, history=history, counted=counted)

    @property
    def paths(self) -> list[Path]:
        """The files of the history."""
        return [run.path for run in self.history]

    @property
    def newest(self) -> SavedRun | None:
        """The named session, else the newest."""
        return self.named or (self.history[-1] if self.history else None)

    @property
    def sessions(self) -> tuple[SavedRun, ...]:
        """The history with the named run moved to the end."""
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
    """The differences between two machines by the keys of IDENTITY, or None.

    Takes the facts of `machine_info.stack` together with `clock`, `threads` and `isolated` of the session.
    """
    old, new = identity(saved), identity(here)
    differences = [f"{key} {_fact(old[key])}, here {_fact(new[key])}" for key in IDENTITY if old[key] != new[key]]
    if old["hosted"] or new["hosted"]:
        differences.append(
            "a hosted runner, where each job may run on another machine; --perf-against needs no stored run"
        )
    return "; ".join(differences) or None


def why_plain_foreign(saved: Mapping[str, object], here: Mapping[str, object]) -> str | None:
    """As `why_foreign` for a plain pytest-benchmark file, by the facts that it has; a session's clock is none of them."""
    known = {key: value for key, value in identity(saved).items() if value is not None}
    return why_foreign({**here, **known}, here)


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
    """Select the runs `NNNN_*.json` under `folder`, at any depth, that are comparable with a session of this machine.

    Rejected with a reason: damaged files, plain, partial, invalid and regressed runs, other machines. A missing folder is
    an empty history; raises BaselineError for a folder that cannot be listed.
    """
    here = {**stack, "clock": clock, "threads": threads, "isolated": isolated}
    history, refused, plain, counted = [], [], [], []
    for path in _numbered_files(Path(folder)):
        try:
            run = read(path)
        except BaselineError as error:
            refused.append((path, str(error).removeprefix(f"{shown(path)}: ")))
            continue
        if run.plain and not why_plain_foreign(run.machine, here):
            plain.append(run)
        if has_comparable_counts(run, here) and not run.partial and not run.regressed:
            counted.append(run)
        foreign = why_foreign(run.machine, here)
        reason = run.why_no_candidate or (foreign and f"foreign: {foreign}")
        if reason:
            refused.append((path, reason))
        else:
            history.append(run)
    # Start times order the sessions, so that a merged storage keeps its order; the number breaks ties within a second.
    for runs in (history, counted):
        runs.sort(key=lambda run: (run.started_unix_seconds or 0.0, run.path.name))
    # A copy, or a resumed session that was saved twice, counts once: duplicates would narrow the prediction interval.
    for run, later in itertools.pairwise(history):
        if run.started_unix_seconds is not None and run.started_unix_seconds == later.started_unix_seconds:
            refused.append((run.path, f"the same session as {later.path.name}"))
    duplicates = {path for path, _ in refused}
    return Choice(
        tuple(run for run in history if run.path not in duplicates),
        tuple(refused),
        plain=tuple(plain),
        counted=tuple(counted),
    )


def _numbered_files(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        if Path(error.filename) == folder and isinstance(error, FileNotFoundError):
            return
        reason = f"cannot be listed: {error.strerror}; check the path and its permissions"
        raise BaselineError(f"{shown(Path(error.filename))}: {reason}") from None

    return sorted(
        Path(parent) / name
        for parent, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if NUMBERED.fullmatch(name)
    )


def judge(current: SavedRun, baseline: SavedRun | Choice, margin: float) -> Judgement:
    """Compare every configuration of a session with stored sessions, or with one run; `margin` is a fraction.

    With 6 stored sessions of a configuration or more, the verdict uses their prediction interval, and the ratio refers to
    their mean; with fewer it is INCONCLUSIVE with the ratio to the newest. The ratio refers to the named run, if any. An
    invalid session gets INVALID verdicts only. A configuration is missing if the newest session of the same selection, or
    the named run, has it. The caller checks that the machines are comparable (`why_foreign`), as `candidates` does.
    """
    choice = baseline if isinstance(baseline, Choice) else Choice((baseline,), named=baseline)
    history, measured = choice.sessions, current.by_id
    known = {id for run in history for id in run.by_id}
    alike = [run for run in history if run is choice.named or run.selection in (None, current.selection)]
    return Judgement(
        {id: _decide(current, benchmark, choice, margin) for id, benchmark in measured.items()},
        missing=missing_in(current, alike[-1]) if alike else (),
        new=tuple(id for id in measured if id not in known),
    )


def judge_foreign(current: SavedRun, baseline: SavedRun) -> Judgement:
    """Plain ratios of session medians between two machines, for information: every verdict is INCONCLUSIVE."""
    new, old = current.by_id, baseline.by_id
    decisions = {}
    for id, benchmark in new.items():
        ratio = Interval.point(benchmark.session_median / old[id].session_median) if id in old else None
        decisions[id] = Decision(Verdict.INCONCLUSIVE, "foreign_machine", ratio, against=baseline.name)
    return Judgement(decisions, missing_in(current, baseline), tuple(id for id in new if id not in old))


def has_comparable_counts(run: SavedRun, here: Mapping[str, object]) -> bool:
    """Whether a run has counts, and of the same kind of device and software; the machine itself does not matter.

    The code for a GPU depends on its model, and that for a CPU on the number of threads.
    """
    keys = ("device", "torch", "triton", "xformers", *(("name",) if here["device"] == "cuda" else ("threads",)))
    same = all(run.machine.get(key) == here.get(key) for key in keys)
    return same and any(each.counts and not each.counts.get("error") for each in run.benchmarks)


def compare_counts(current: SavedRun, stored: Iterable[SavedRun]) -> dict[str, CountsComparison]:
    """Compare the counts of each configuration with the last of the stored runs that has it with equal work."""
    comparisons = {}
    for run in stored:
        for id, old in run.by_id.items():
            new = current.by_id.get(id)
            counted = old.counts and not old.counts.get("error")
            if new is not None and counted and _same_work(new.configuration, old.configuration):
                comparisons[id] = compare(new.counts, old.counts, run.name)
    return comparisons


def missing_in(current: SavedRun, baseline: SavedRun) -> tuple[str, ...]:
    """Configurations of the baseline that the session lacks; plain benchmarks of the file do not count."""
    return tuple(id for id, old in baseline.by_id.items() if old.configuration and id not in current.by_id)


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
    # `fast` chooses the precision on a CPU by what the processor does well, so the configuration alone does not tell it.
    past = [
        (run, old)
        for run, old in past
        if None in (old.precision, benchmark.precision) or old.precision == benchmark.precision
    ]
    if not past:
        return Decision(Verdict.INCONCLUSIVE, "other_precision", margin=margin, against=against)
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
    # A named run that regressed or is invalid is excluded: the history must show the variation without a change.
    history = [
        statistics.median(values) for run, values in anchored if run is not choice.named or not run.why_no_candidate
    ]
    if len(history) < MIN_SESSIONS:
        ratio = ratio_of_sessions(benchmark.anchored_launch_medians, launches, seed)
        raw = benchmark.session_median / last.by_id[benchmark.id].session_median
        return Decision(Verdict.INCONCLUSIVE, "too_few_sessions", ratio, margin, last.name, raw)
    if current.drifted:
        ratio = ratio_of_sessions(benchmark.anchored_launch_medians, launches, seed)
        return Decision(Verdict.INCONCLUSIVE, _coded("anchor_drift", current.drifted), ratio, margin, last.name)
    median = statistics.median(benchmark.anchored_launch_medians)
    base = statistics.median(launches) if last is choice.named else None
    against = last.name if base is not None else f"{len(history)} sessions up to {last.name}"
    decision = decide_against_history(median, history, margin, against, base)
    # The raw ratio has the same reference: the named session, or the mean of the stored ones.
    compared = [last] if base is not None else [run for run, _ in anchored]
    raw = statistics.geometric_mean(run.by_id[benchmark.id].session_median for run in compared)
    return replace(decision, raw_ratio=benchmark.session_median / raw)


def _coded(code: str, detail: str) -> str:
    """A reason from a file, with `code` prepended unless it starts with a known code."""
    return detail if detail.partition(" ")[0] in REASONS else f"{code} {detail}"


def _same_work(new: Mapping[str, object] | None, old: Mapping[str, object] | None) -> bool:
    """Whether all common fields agree; a field that older files lack had one possible value then."""
    if new is None or old is None:
        return new is old
    return all(new[key] == old[key] for key in new.keys() & old.keys())
