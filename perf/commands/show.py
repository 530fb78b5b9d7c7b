"""`python -m perf show`: print saved runs as tables, without torch."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from perf.analysis.statistics import launch_interval, margin
from perf.analysis.verdicts import ExitCode
from perf.report.text import seconds, size
from perf.runs.saved_run import BaselineError, SavedBenchmark, SavedRun, read

SCHEMA = 1
COLUMNS = (
    "configuration",
    "launches",
    "median",
    "95 % interval",
    "per image",
    "first call",
    "peak",
    "J/image",
    "verdict",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `show`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="A.json", help="saved runs to print")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print every readable run. Returns 4 if one cannot be read, else 0."""
    status, sessions = ExitCode.OK, []
    for path in args.runs:
        try:
            sessions.append(read(path))
        except BaselineError as error:
            print(error, file=sys.stderr)
            status = ExitCode.REFUSED
    if args.json:
        print(json.dumps({"schema": SCHEMA, "runs": list(map(as_dict, sessions))}))
        return status
    for session in sessions:
        _show(session)
    return status


def as_dict(session: SavedRun) -> dict:
    """A saved run as `--json` prints it: times in seconds, sizes in bytes, unknown values null."""
    return {
        "name": session.name,
        "machine": dict(session.machine),
        "started_unix_seconds": session.started_unix_seconds,
        "total_rounds": session.total_rounds,
        "invalid_rounds": session.invalid_rounds,
        "drift": session.anchor_drift,
        "flags": flags(session),
        "configurations": [_benchmark_as_dict(benchmark) for benchmark in session.benchmarks],
    }


def _benchmark_as_dict(benchmark: SavedBenchmark) -> dict:
    medians = benchmark.launch_medians
    interval = launch_interval(medians) if len(medians) >= 2 else None
    return {
        "id": benchmark.id,
        "variant": benchmark.variant,
        "launches": len(medians),
        "median_seconds": benchmark.session_median,
        "interval_seconds": [interval.low, interval.high] if interval else None,
        "seconds_per_image": benchmark.seconds_per_image,
        "first_call_seconds": benchmark.first_call_seconds,
        "peak_bytes": benchmark.peak_bytes,
        "joules_per_image": benchmark.joules_per_image,
        "image_failure": benchmark.image_failure,
        "verdict": benchmark.decision.as_dict() if benchmark.decision else None,
    }


def _show(session: SavedRun) -> None:
    facts = session.machine
    keys = ("name", "processor", "driver", "torch", "cuda", "python", "clock", "threads")
    print(f"{session.name}: " + ", ".join(f"{key} {facts[key]}" for key in keys if facts[key] is not None))
    if session.started_unix_seconds is not None:
        begin = datetime.fromtimestamp(session.started_unix_seconds, timezone.utc)
        valid = session.total_rounds - session.invalid_rounds
        print(f"started {begin:%Y-%m-%d %H:%M} UTC, {valid} of {session.total_rounds} rounds valid")
    if session.anchor_drift is not None:
        print(f"reference workload {session.anchor_name} drifted by {100 * session.anchor_drift:.1f} %")
    if session.aa_ratios:
        print(f"A/A: {len(session.aa_ratios)} comparisons, margin {100 * margin(session.aa_ratios):.1f} %")
    for flag in flags(session):
        print(flag)
    print_table(COLUMNS, [_row(benchmark) for benchmark in session.benchmarks])
    print("Medians over launches, with the exact interval of the sign test, or Student's t below 6 launches.")


def _row(benchmark: SavedBenchmark) -> list[str]:
    medians, joules = benchmark.launch_medians, benchmark.joules_per_image
    interval = launch_interval(medians) if len(medians) >= 2 else None
    verdict = f"wrong image: {benchmark.image_failure}" if benchmark.image_failure else str(benchmark.decision or "-")
    return [
        benchmark.id if benchmark.variant is None else f"{benchmark.id} ({benchmark.variant})",
        str(len(medians)),
        seconds(benchmark.session_median),
        f"[{seconds(interval.low)}, {seconds(interval.high)}]" if interval else "-",
        seconds(benchmark.seconds_per_image),
        seconds(benchmark.first_call_seconds),
        size(benchmark.peak_bytes) or "-",
        "-" if joules is None else f"{joules:.1f}",
        verdict,
    ]


def flags(session: SavedRun) -> list[str]:
    """The reasons that bar a run from being a baseline, such as `partial: deselected 3 of 9`."""
    values = {"partial": session.partial, "invalid": session.invalid, "drifted": session.drifted}
    values["regressed"] = ", ".join(session.regressed)
    return [f"{name}: {value}" for name, value in values.items() if value]


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: by rich on a terminal, else as aligned columns, which a pipe neither wraps nor truncates."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*headers, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(Text, row))  # str would be parsed as markup
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(headers, *rows)]
    for row in (headers, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
