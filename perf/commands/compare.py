"""`python -m perf compare` and `python -m perf show`: saved runs judged and printed, on a machine without torch."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from perf.analysis.statistics import MIN_SESSIONS, MIN_VALUES, margin, sign_interval
from perf.analysis.verdicts import ExitCode, exit_code
from perf.report.text import seconds, size
from perf.runs.baselines import Choice, Judgement, candidates, judge, judge_foreign, why_foreign
from perf.runs.saved_run import BaselineError, SavedBenchmark, SavedRun, read, shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `compare`."""
    parser.add_argument("baseline", type=Path, metavar="A.json", help="the saved run to compare with")
    parser.add_argument("current", type=Path, metavar="B.json", help="the saved run to judge")
    parser.add_argument(
        "--storage", type=Path, metavar="FOLDER", help=f"judge B against all sessions stored here, from {MIN_SESSIONS}"
    )
    parser.add_argument(
        "--margin",
        type=_percentage,
        metavar="PERCENT",
        help="changes up to here are none; default: from stored A/A, at least 1",
    )
    parser.add_argument(
        "--foreign", action="store_true", help="show ratios between different machines, without a verdict"
    )
    parser.add_argument(
        "--strict", action="store_true", help=f"exit with {ExitCode.INCONCLUSIVE:d} where nothing is known"
    )


def add_show_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `show`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="A.json", help="saved runs to print")


def _percentage(text: str) -> float:
    value = float(text.removesuffix("%"))
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError("must lie between 0 and 100 percent")
    return value / 100


def run(args: argparse.Namespace) -> int:
    """Judge B against A, or against a storage. Exit status: 0; 20 slower and nothing else wrong; 21 as asked by --strict.

    1 where a verdict is INVALID or B lacks a configuration of A; 4 where a run cannot be read or is of another machine.
    """
    try:
        baseline, current = read(args.baseline), read(args.current)
        foreign = why_foreign(baseline.machine, current.machine)
        if foreign and not args.foreign:
            other = f"{shown(args.baseline)}: is of another machine than {shown(args.current)}"
            raise BaselineError(f"{other}: {foreign}; --foreign shows the ratios anyway")
        choice = None if args.storage is None or foreign else _stored(args.storage, baseline, current)
    except BaselineError as error:
        print(error, file=sys.stderr)
        return ExitCode.REFUSED
    known = choice.history if choice else ()
    limit = args.margin or margin([ratio for session in (baseline, current, *known) for ratio in session.aa_ratios])
    judgement = judge_foreign(current, baseline) if foreign else judge(current, choice or baseline, limit)
    _print_comparison(baseline, current, judgement)
    print(_caveat(foreign, choice, baseline, limit))
    for path, reason in choice.refused if choice else ():
        print(f"not used: {shown(path)}: {reason}")
    return exit_code(judgement.decisions.values(), failed=bool(judgement.missing), strict=args.strict)


def _stored(folder: Path, baseline: SavedRun, current: SavedRun) -> Choice:
    """What is stored of B's machine and older than B, with A, whether it is stored there or not."""
    facts = current.machine
    threads = facts["threads"]
    choice = candidates(
        folder,
        facts,
        str(facts["clock"]),
        int(threads) if isinstance(threads, (int, float)) else None,
        isolated=facts["isolated"] is True,
    )
    begin = current.started_unix_seconds or 0.0
    history = [session for session in choice.history if (session.started_unix_seconds or 0.0) < begin]
    if baseline.why_no_candidate is None and all(
        session.started_unix_seconds != baseline.started_unix_seconds for session in (*history, current)
    ):
        history.append(baseline)
    history.sort(key=lambda session: session.started_unix_seconds or 0.0)
    return Choice(tuple(history), choice.refused)


def _caveat(foreign: str | None, choice: Choice | None, baseline: SavedRun, limit: float) -> str:
    """What the intervals of the table do and do not contain."""
    if foreign:
        return f"Different machines ({foreign}): ratios of medians, no verdict."
    rule = f"Margin {100 * limit:.1f} %."
    if choice is None:
        rule += " Intervals are those of these two sessions: what sessions differ in without a change is not in them"
        return f"{rule}; --storage FOLDER with {MIN_SESSIONS} sessions or more gives verdicts."
    if len(choice.history) < MIN_SESSIONS:
        return f"{rule} {len(choice.history)} stored sessions, {MIN_SESSIONS} are needed for verdicts."
    return f"{rule} Prediction intervals over {len(choice.history)} stored sessions, each divided by its anchor."


def _print_comparison(baseline: SavedRun, current: SavedRun, judgement: Judgement) -> None:
    old, new = baseline.by_id, current.by_id
    rows = []
    for id, decision in judgement.decisions.items():
        before = seconds(old[id].session_median) if id in old else "-"
        rows.append([id, before, seconds(new[id].session_median), str(decision)])
    _print_table(["configuration", f"A: {baseline.name}", f"B: {current.name}", "verdict"], rows)
    for session in (baseline, current):
        for flag in _flags(session):
            print(f"{session.name} is {flag}")
    if judgement.missing:
        print(f"missing in B: {', '.join(judgement.missing)}")
    if judgement.new:
        print(f"new in B: {', '.join(judgement.new)}")


def _flags(session: SavedRun) -> list[str]:
    named = [("partial", session.partial), ("invalid", session.invalid), ("regressed", ", ".join(session.regressed))]
    return [f"{name}: {value}" for name, value in named if value]


def run_show(args: argparse.Namespace) -> int:
    """Print saved runs; returns 4 if one cannot be read, the others being printed all the same."""
    status = ExitCode.OK
    for path in args.runs:
        try:
            _show(read(path))
        except BaselineError as error:
            print(error, file=sys.stderr)
            status = ExitCode.REFUSED
    return status


def _show(session: SavedRun) -> None:
    facts = session.machine
    named = ("name", "driver", "torch", "cuda", "python", "clock", "threads")
    print(f"{session.name}: " + ", ".join(f"{key} {facts[key]}" for key in named if facts[key] is not None))
    if session.started_unix_seconds is not None:
        begin = datetime.fromtimestamp(session.started_unix_seconds, timezone.utc)
        kept = session.total_rounds - session.invalid_rounds
        print(f"started {begin:%Y-%m-%d %H:%M} UTC, {kept} of {session.total_rounds} rounds valid")
    if session.anchor_drift is not None:
        print(f"anchor {session.anchor_name} drifted by {100 * session.anchor_drift:.1f} %")
    if session.aa_ratios:
        print(f"A/A: {len(session.aa_ratios)} comparisons, margin {100 * margin(session.aa_ratios):.1f} %")
    for flag in _flags(session):
        print(flag)
    headers = [
        "configuration",
        "launches",
        "median",
        "95 % interval",
        "per image",
        "first call",
        "peak",
        "J/image",
        "verdict",
    ]
    _print_table(headers, [_row(benchmark) for benchmark in session.benchmarks])
    print("Medians over launches, with the exact interval of the sign test.")


def _row(benchmark: SavedBenchmark) -> list[str]:
    medians = benchmark.launch_medians
    span = "-"
    if len(medians) >= MIN_VALUES:
        interval = sign_interval(medians)
        span = f"[{seconds(interval.low)}, {seconds(interval.high)}]"
    peak, joules = benchmark.peak_bytes, benchmark.joules_per_image
    verdict = f"wrong image: {benchmark.image_failure}" if benchmark.image_failure else str(benchmark.decision or "-")
    return [
        benchmark.id if benchmark.variant is None else f"{benchmark.id} ({benchmark.variant})",
        str(len(medians)),
        seconds(benchmark.session_median),
        span,
        seconds(benchmark.seconds_per_image),
        seconds(benchmark.first_call_seconds),
        size(peak) or "-",
        "-" if joules is None else f"{joules:.1f}",
        verdict,
    ]


def _print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """With rich on a terminal that has it; else aligned columns, which a pipe neither wraps nor cuts off."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*headers, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*[Text(cell) for cell in row])  # not str: names with brackets would be read as markup
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]
    for row in (headers, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
