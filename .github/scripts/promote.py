"""Store sessions of main as baselines, and prune them. This is the only writer, and runs on a hosted machine.

A session is promoted when it is complete, has no invalid round, is not slower than the stored sessions, and when the newest A/A
session of its machine was SAME. So a slower commit becomes a baseline only by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from outcomes import RUN, UNMEASURED, Outcome, check, collect, decisions, history, without_path
from workflow import AA, Refusal, add_to_summary, annotate, main, setting

from perf.analysis.statistics import MIN_SESSIONS
from perf.analysis.verdicts import Verdict
from perf.report.results import read_session
from perf.runs.baselines import judge
from perf.runs.saved_run import BaselineError, SavedRun, load, read
from perf.runs.storage import save_numbered, saved_runs_in, storage_name

KEEP = 12  # sessions of each machine and stack
LEAST = 8  # pruning must leave more than the MIN_SESSIONS of a verdict
assert KEEP >= LEAST > MIN_SESSIONS


def why_not(outcome: Outcome, run: SavedRun, size: tuple[int, int], baselines: Path) -> str | None:
    """Return the reason against a promotion, None without one.

    size: launches and rounds of a complete session; pairs have more launches where the first look left them undecided, and on
    a CPU more rounds in noisy launches. baselines: the folder of the machine's label.
    """
    if run.why_no_candidate:
        return run.why_no_candidate
    if outcome.status == UNMEASURED and outcome.series != AA:  # a failed A/A session is stored: it blocks the others
        missing = [f"missing: {', '.join(outcome.missing)}"] if outcome.missing else []
        return "; ".join([*outcome.reasons, *missing]) or outcome.status
    if run.invalid_rounds:
        return f"{run.invalid_rounds} of {run.total_rounds} rounds were invalid"
    sizes = [(len(benchmark.launches), min(map(len, benchmark.launches), default=0)) for benchmark in run.benchmarks]
    if not sizes or any(made < requested for pair in sizes for made, requested in zip(pair, size)):
        return "it is not complete: a configuration lacks launches or rounds"
    if outcome.series == AA:
        return None
    stored = history(baselines / outcome.series, run)
    judgement = judge(run, stored, stored.margin)
    if judgement.missing:
        return f"it is not complete: {', '.join(judgement.missing)} missing"
    bad = [id for id, it in judgement.decisions.items() if it.verdict in (Verdict.SLOWER, Verdict.INVALID)]
    if bad:
        return f"slower than the baseline: {', '.join(bad)}"
    noise = history(baselines / AA, run).newest
    if noise is not None and any(decision.verdict is not Verdict.SAME for decision in decisions(noise)):
        return f"the last A/A session of this machine, {noise.name}, was not SAME"
    return None


def store(outcome: Outcome, run: SavedRun, baselines: Path) -> Path:
    """Write a session as SERIES/STACK/NNNN_commit_uuid.json."""
    folder = baselines / outcome.series / storage_name(run.machine)
    uuid = str(run.machine.get("uuid") or "cpu").removeprefix("GPU-")[:8]
    return save_numbered(folder, f"{outcome.sha[:12]}_{uuid}", load(run.path))


def prune(folder: Path, keep: int = KEEP) -> list[Path]:
    """Delete all but the newest sessions of each machine and stack, and return their paths. Unreadable files stay."""
    if keep < LEAST:
        raise Refusal(f"at least {LEAST} sessions are kept: a verdict needs {MIN_SESSIONS}")
    by_machine: dict[str, list[SavedRun]] = {}
    for path in saved_runs_in(folder):
        try:
            run = read(path)
        except BaselineError as error:
            annotate("warning", f"not a session: {path.name}: {error}")
            continue
        by_machine.setdefault(json.dumps(run.machine, sort_keys=True), []).append(run)
    old = []
    for runs in by_machine.values():
        runs.sort(key=lambda run: (run.started_unix_seconds or 0.0, run.path.name))
        old += [run.path for run in runs[:-keep]]
    for path in old:
        path.unlink()
    return old


def run() -> int:
    """Promote what may be promoted and list the rest with reasons. Return 0: the measuring job reports what is slower.

    Raises Refusal where there is no outcome: even a failed measurement leaves one.
    """
    artifacts, data = Path(setting("ARTIFACTS", "artifacts")), Path(setting("BASELINES", "baselines"))
    if setting("GITHUB_REF") != "refs/heads/main":
        raise Refusal("only main writes baselines")
    sha, lines = setting("GITHUB_SHA"), []
    outcomes = list(collect(artifacts, sha))
    if not outcomes:
        raise Refusal(f"no machine left an outcome in {artifacts}")
    for outcome, artifact in outcomes:
        name, baselines = f"{outcome.label} {outcome.series}", data / outcome.label
        if artifact is None or not outcome.has_run:
            annotate("warning", f"not promoted: {name}: {'; '.join(outcome.reasons)}")
            continue
        path = artifact / RUN
        try:
            if outcome.sha != sha or outcome.against:
                raise Refusal("it is not of this commit of main")
            session, _ = read_session(path)
            checked, size = check(outcome, artifact, baselines / outcome.series), (session.launches, session.rounds)
            if reason := why_not(checked, session.saved, size, baselines):
                raise Refusal(reason)
            lines.append(f"{name}: promoted as {store(outcome, session.saved, baselines).name}")
        except (Refusal, BaselineError) as error:
            lines.append(f"{name}: not promoted: {without_path(error, path)}")
        lines += [f"{name}: pruned {old.name}" for old in prune(baselines / outcome.series)]
    text = "\n".join(f"- {line}" for line in lines or ["nothing to promote"])
    print(text)
    add_to_summary(f"## Baselines\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
