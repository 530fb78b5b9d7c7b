"""`python -m perf report`: saved runs in, a folder with plots, tables and one page out. Needs neither torch nor pytest."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from pathlib import Path

from perf.analysis.verdicts import ExitCode
from perf.report import build, summary
from perf.report.tables import UnknownReference
from perf.runs.baselines import NUMBERED
from perf.runs.saved_run import BaselineError, content_of, document_in
from perf.runs.storage import of_another_kind, saved_runs_in, write_atomically

NEEDED = ("matplotlib", "plotly")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `report`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN.json", help="saved runs, or folders of them")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where plots, tables and index.html go")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write the Markdown of a CI summary here")
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", help="PNGs named after configurations (--perf-trace makes them)"
    )
    parser.add_argument("--reference", metavar="ROW", help="the row of the tables that improvements refer to")


def run(args: argparse.Namespace) -> int:
    """Write a report. Exit status: 0; 1 where some runs could not be read; 4 where none could, or on a usage error."""
    if args.output is None and args.summary is None:
        return _refuse("report: nothing to write: give --output DIR, --summary FILE or both")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if args.output is not None and missing:
        return _refuse(f'report: {" and ".join(missing)} not installed: pip install "sd-perf[report]"')
    paths = [one for path in args.runs for one in (_found_in(path) if path.is_dir() else [path])]
    try:
        report = build.gather(paths, args.reference, args.pictures, say=_say)
        for line in report.refused:
            print(line, file=sys.stderr)
        if args.summary is not None:
            write_atomically(args.summary, summary.markdown_of(report))
        if not report.sessions:
            return _refuse("report: no saved run could be read")
        if args.output is not None:
            written = build.write(report, args.output, say=_say)
            _say(f"report: {len(written)} files, begin with {written[0]}")
    except (BaselineError, UnknownReference) as error:
        return _refuse(str(error))
    return ExitCode.FAILED if report.refused else ExitCode.OK


def _found_in(folder: Path) -> list[Path]:
    """The saved runs under a folder, and what is damaged, to be named; not whole JSON of another kind."""
    found = []
    for path in saved_runs_in(folder):
        with contextlib.suppress(BaselineError):
            if not NUMBERED.fullmatch(path.name) and of_another_kind(path, document_in(content_of(path), path)):
                continue
        found.append(path)
    return found


def _refuse(words: str) -> int:
    print(words, file=sys.stderr)
    return ExitCode.REFUSED


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
