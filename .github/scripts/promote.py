"""Take sessions of main into the baselines, on a hosted machine, and prune them: the only writer there is.

A session is promoted when it is whole, has every configuration that the series has, not one invalid round, and is not
slower than what is stored, judged here once more; and while the machine's last session against itself came back SAME. So a
slower commit never becomes what the next one is compared with, unless somebody puts it there by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import outcomes
from house import AA, Refusal, annotate, fleet, given, main, summary
from outcomes import FILE, RUN, UNMEASURED, Outcome

from perf.analysis.statistics import MIN_SESSIONS
from perf.analysis.verdicts import Verdict
from perf.runs.baselines import judge
from perf.runs.saved_run import BaselineError, SavedRun, load, read
from perf.runs.storage import save_numbered, storage_name

KEEP = 12  # sessions of each machine and stack; a verdict needs MIN_SESSIONS, and pruning must never take it away
LEAST = 8
assert KEEP >= LEAST > MIN_SESSIONS


def why_not(one: Outcome, run: SavedRun, baselines: Path) -> str | None:
    """Why a session may not become a baseline; None where it may. baselines: the folder of its label."""
    if run.why_no_candidate:
        return run.why_no_candidate
    if one.kind == UNMEASURED and one.series != AA:  # a noisy machine's A/A is kept: it is what holds the others back
        missing = [f"missing: {', '.join(one.missing)}"] if one.missing else []
        return "; ".join([*one.reasons, *missing]) or one.kind
    if run.invalid_rounds:
        return f"{run.invalid_rounds} of {run.total_rounds} rounds were invalid"
    found = {(len(one.launches), len(rounds)) for one in run.benchmarks for rounds in one.launches}
    if found != {_asked_for(run)}:
        return "it is not complete: not every configuration has all its launches and rounds"
    if one.series == AA:
        return None
    stored = outcomes.history(baselines / one.series, run)
    judgement = judge(run, stored, stored.margin)
    if judgement.missing:
        return f"it is not complete: {', '.join(judgement.missing)} missing"
    bad = [id for id, found in judgement.decisions.items() if found.verdict in (Verdict.SLOWER, Verdict.INVALID)]
    if bad:
        return f"slower than the baseline: {', '.join(bad)}"
    noise = outcomes.history(baselines / AA, run).newest
    if noise is not None and any(found.verdict is not Verdict.SAME for found in outcomes.decisions(noise)):
        return f"this machine's last session against itself, {noise.name}, did not come back SAME"
    return None


def _asked_for(run: SavedRun) -> tuple[object, object]:
    """(launches, rounds of each) that the session was to have."""
    perf = load(run.path)["perf"]
    return perf.get("launches"), perf.get("rounds")


def found_in(artifacts: Path) -> Iterator[tuple[Outcome, Path]]:
    """Every outcome with a run in what the machines left."""
    for path in sorted(artifacts.glob(f"*/*/{FILE}")):
        label, folder = path.parent.parent.name.partition("-")[2], path.parent
        try:
            one = outcomes.load(folder)
            if label not in fleet() or (one.label, one.series) != (label, folder.name):
                raise Refusal(f"{FILE}: is not of {label} {folder.name}")
            if one.has_run:
                yield one, folder / RUN
        except Refusal as refusal:
            annotate("warning", f"not promoted: {folder.parent.name}/{folder.name}: {refusal}")


def store(one: Outcome, run: SavedRun, baselines: Path) -> Path:
    """Write a session under its series, a folder for each stack, by commit and machine."""
    document = load(run.path)
    folder = baselines / one.series / storage_name(document["machine_info"]["stack"])
    machine = str(run.machine.get("uuid") or "cpu").removeprefix("GPU-")[:8]
    return save_numbered(folder, f"{one.sha[:12]}_{machine}", document)


def prune(folder: Path, keep: int = KEEP) -> list[Path]:
    """Delete all but the newest sessions of each machine and stack under a folder; what cannot be read stays."""
    if keep < LEAST:
        raise Refusal(f"at least {LEAST} sessions are kept: a verdict rests on {MIN_SESSIONS}")
    by_machine: dict[str, list[SavedRun]] = {}
    for path in sorted(folder.rglob("[0-9]*_*.json")):
        try:
            one = read(path)
        except BaselineError as error:
            annotate("warning", f"not a session: {path.name}: {error}")
            continue
        by_machine.setdefault(json.dumps(one.machine, sort_keys=True), []).append(one)
    gone = []
    for sessions in by_machine.values():
        sessions.sort(key=lambda one: (one.started_unix_seconds or 0.0, one.path.name))
        for one in sessions[:-keep]:
            one.path.unlink()
            gone.append(one.path)
    return gone


def run() -> int:
    """Promote what may be, say of the rest why not; 0 either way, since the job that measured has said what is slower."""
    artifacts, data = Path(given("ARTIFACTS", "artifacts")), Path(given("BASELINES", "baselines"))
    if given("GITHUB_REF") != "refs/heads/main":
        raise Refusal("only main writes baselines")
    sha, lines = given("GITHUB_SHA"), []
    for one, path in found_in(artifacts):
        folder = data / one.label
        if one.sha != sha or one.against:
            lines.append(f"{one.label} {one.series}: not promoted: it is not of this commit of main")
            continue
        try:
            session = read(path)
            reason = why_not(outcomes.examine(one, path.parent, folder / one.series), session, folder)
            where = None if reason else store(one, session, folder)
        except BaselineError as error:
            reason, where = str(error).replace(f"{path}: ", ""), None
        lines.append(
            f"{one.label} {one.series}: " + (f"promoted as {where.name}" if where else f"not promoted: {reason}")
        )
        pruned = prune(folder / one.series)
        lines += [f"{one.label} {one.series}: pruned {old.name}" for old in pruned]
    text = "\n".join(f"- {line}" for line in lines or ["nothing to promote"])
    print(text)
    summary(f"## Baselines\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
