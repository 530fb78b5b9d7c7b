"""`python -m perf compare`: judge one saved run against another or against a storage, without torch."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from perf.analysis.statistics import MIN_SESSIONS, margin
from perf.analysis.verdicts import ExitCode, exit_code
from perf.commands.show import SCHEMA, as_dict, flags, print_table
from perf.report.text import seconds
from perf.runs.baselines import (
    Choice,
    Judgement,
    candidates,
    compare_counts,
    judge,
    judge_foreign,
    missing_in,
    why_foreign,
)
from perf.runs.saved_run import BaselineError, SavedRun, read, shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `compare`."""
    add = parser.add_argument
    add("baseline", type=Path, metavar="A.json", help="the saved run to compare with")
    add("current", type=Path, metavar="B.json", help="the saved run to judge")
    help = f"judge B against all comparable sessions in this folder; verdicts need {MIN_SESSIONS}"
    add("--storage", type=Path, metavar="FOLDER", help=help)
    help = "the smallest change that counts (default: from stored A/A comparisons, at least 1)"
    add("--margin", type=_percentage, metavar="PERCENT", help=help)
    add("--foreign", action="store_true", help="show ratios between different machines, without verdicts")
    add("--json", action="store_true", help="print JSON")
    add("--strict", action="store_true", help=f"exit with {ExitCode.INCONCLUSIVE:d} if a comparison is inconclusive")


def _percentage(text: str) -> float:
    value = float(text.removesuffix("%"))
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError("must lie between 0 and 100 percent")
    return value / 100


def run(args: argparse.Namespace) -> int:
    """Judge B against A, or against a storage.

    Exit status: 0; 1 if a verdict is INVALID or B lacks a configuration of A; 4 if a run is unreadable or of another
    machine; 20 if B is slower and nothing else is wrong; 21 with --strict if a comparison is inconclusive.
    """
    try:
        baseline, current = read(args.baseline), read(args.current)
        foreign = why_foreign(baseline.machine, current.machine)
        if foreign and not args.foreign:
            machines = f"{shown(args.baseline)}: is of another machine than {shown(args.current)}"
            raise BaselineError(f"{machines}: {foreign}; --foreign shows the ratios anyway")
        choice = None if args.storage is None or foreign else _stored(args.storage, baseline, current)
    except BaselineError as error:
        print(error, file=sys.stderr)
        return ExitCode.REFUSED
    history = choice.history if choice else ()
    limit = args.margin or margin([ratio for session in (baseline, current, *history) for ratio in session.aa_ratios])
    judgement = judge_foreign(current, baseline) if foreign else judge(current, choice or baseline, limit)
    judgement = replace(judgement, missing=missing_in(current, baseline))  # in A, which the user named
    status = exit_code(judgement.decisions.values(), failed=bool(judgement.missing), strict=args.strict)
    if args.json:
        print(
            json.dumps({**_as_dict(baseline, current, judgement), "margin": limit, "foreign": foreign, "exit": status})
        )
        return status
    _print_comparison(baseline, current, judgement)
    print(_caveat(foreign, choice, limit))
    for path, reason in choice.refused if choice else ():
        print(f"not used: {shown(path)}: {reason}")
    return status


def _as_dict(baseline: SavedRun, current: SavedRun, judgement: Judgement) -> dict:
    """A comparison as `--json` prints it: decisions as in a saved run, by configuration."""
    return {
        "schema": SCHEMA,
        "baseline": as_dict(baseline),
        "current": as_dict(current),
        "decisions": {id: decision.as_dict() for id, decision in judgement.decisions.items()},
        "missing": list(judgement.missing),
        "new": list(judgement.new),
    }


def _stored(folder: Path, baseline: SavedRun, current: SavedRun) -> Choice:
    """The stored sessions of B's machine that are older than B, with A added if the folder lacks it."""
    machine, threads = current.machine, current.machine["threads"]
    threads = int(threads) if isinstance(threads, (int, float)) else None
    choice = candidates(folder, machine, str(machine["clock"]), threads, isolated=machine["isolated"] is True)
    begin = current.started_unix_seconds or 0.0
    history = [session for session in choice.history if (session.started_unix_seconds or 0.0) < begin]
    known = {session.started_unix_seconds for session in (*history, current)}
    if baseline.why_no_candidate is None and baseline.started_unix_seconds not in known:
        history.append(baseline)
    history.sort(key=lambda session: session.started_unix_seconds or 0.0)
    return Choice(tuple(history), choice.refused)


def _caveat(foreign: str | None, choice: Choice | None, limit: float) -> str:
    """The meaning of the intervals in the table."""
    if foreign:
        return f"Different machines ({foreign}): ratios of medians, no verdict."
    rule = f"Margin {100 * limit:.1f} %."
    if choice is None:
        return (
            f"{rule} The intervals cover the variation within these two sessions, not between sessions; "
            f"--storage FOLDER with {MIN_SESSIONS} sessions or more gives verdicts."
        )
    if len(choice.history) < MIN_SESSIONS:
        return f"{rule} {len(choice.history)} stored sessions, {MIN_SESSIONS} are needed for verdicts."
    return f"{rule} Prediction intervals over {len(choice.history)} stored sessions, each relative to its reference workload."


def _print_comparison(baseline: SavedRun, current: SavedRun, judgement: Judgement) -> None:
    old, new = baseline.by_id, current.by_id
    rows = []
    for id, decision in judgement.decisions.items():
        before = seconds(old[id].session_median if id in old else None)
        rows.append([id, before, seconds(new[id].session_median), str(decision)])
    print_table(["configuration", f"A: {baseline.name}", f"B: {current.name}", "verdict"], rows)
    for id, compared in compare_counts(current, [baseline]).items():
        if compared.changes:
            print(f"{id}: {compared}")
    for session in (baseline, current):
        for flag in flags(session):
            print(f"{session.name} is {flag}")
    if judgement.missing:
        print(f"missing in B: {', '.join(judgement.missing)}")
    if judgement.new:
        print(f"new in B: {', '.join(judgement.new)}")
