"""`python -m perf history`: change points over the stored sessions of each machine, with their commit ranges."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from perf.analysis.verdicts import ExitCode
from perf.report.text import counted
from perf.runs import history
from perf.runs.saved_run import BaselineError, SavedRun, read, shown
from perf.runs.storage import saved_runs_in


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `history`."""
    help = "saved runs, or folders of saved runs (default: .benchmarks)"
    parser.add_argument("runs", type=Path, nargs="*", default=[Path(".benchmarks")], metavar="RUN.json", help=help)


def run(args: argparse.Namespace) -> int:
    """Print the change points. Returns 4 if nothing can be read or `ruptures` is missing, else 0."""
    if not history.is_available():
        print(f'history needs {history.PACKAGE}: pip install "sd-perf[history]"', file=sys.stderr)
        return ExitCode.REFUSED
    runs = _readable([run for path in args.runs for run in (saved_runs_in(path) if path.is_dir() else [path])])
    if not runs:
        print(f"no saved run in {', '.join(shown(path) for path in args.runs)}", file=sys.stderr)
        return ExitCode.REFUSED
    series = history.series_of(runs)
    long = [one for one in series if len(one.values) >= history.MIN_POINTS]
    changes = 0
    for one in long:
        for change in history.find_changes(one):
            print(f"{one.machine}, {one.id}: {change}")
            changes += 1
    print(f"{counted(changes, 'change point')} in {len(long)} series of {history.MIN_POINTS} sessions or more")
    if len(long) < len(series):
        print(f"{len(series) - len(long)} series have fewer sessions")
    return ExitCode.OK


def _readable(paths: list[Path]) -> list[SavedRun]:
    """The runs of a history; the others are printed with the reason."""
    runs = []
    for path in paths:
        try:
            saved = read(path)
        except BaselineError as error:
            print(f"not used: {error}", file=sys.stderr)
            continue
        reason = history.why_left_out(saved)
        if reason:
            print(f"not used: {shown(path)}: {reason}", file=sys.stderr)
        else:
            runs.append(saved)
    return runs
