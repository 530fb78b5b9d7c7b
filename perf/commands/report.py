"""`python -m perf report`: write plots, tables, a page and a summary of saved runs. Needs neither torch nor pytest."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from pathlib import Path

from perf.analysis.verdicts import ExitCode
from perf.report import build, summary
from perf.report.tables import UnknownReference
from perf.runs.baselines import NUMBERED
from perf.runs.saved_run import BaselineError, content_of, document_in
from perf.runs.storage import of_another_kind, saved_runs_in, write_atomically


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN.json", help="saved runs, or folders of saved runs")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for plots, tables and index.html")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write the Markdown of a CI job summary")
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", help="images named after configurations, from --perf-trace (PNG)"
    )
    parser.add_argument(
        "--repository",
        type=_address,
        default=build.workflow_repository(os.environ),
        metavar="URL",
        help="site of the repository, to link commits (default: that of the GitHub workflow)",
    )
    parser.add_argument("--reference", metavar="ROW", help="row of the tables that improvements refer to")


def run(args: argparse.Namespace) -> int:
    """Write a report. Exit status: 0; 1 if some runs are unreadable; 4 if all are, or on a usage error."""
    if args.output is None and args.summary is None:
        return _refuse("report: nothing to write: give --output DIR, --summary FILE or both")
    missing = build.missing_packages()
    if args.output is not None and missing:
        return _refuse(f'report: {" and ".join(missing)} not installed: pip install "sd-perf[report]"')
    paths = [run for path in args.runs for run in (_runs_in(path) if path.is_dir() else [path])]
    try:
        report = build.gather(paths, args.reference, args.pictures, args.repository, say=_say)
        for line in report.refused:
            _say(line)
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


def _address(text: str) -> str:
    """A web address without its last slash. Raises ArgumentTypeError."""
    if not re.fullmatch(r"https?://[A-Za-z0-9._~:/-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no web address, such as https://github.com/OWNER/NAME")
    return text.rstrip("/").removesuffix(".git")


def _runs_in(folder: Path) -> list[Path]:
    """Saved runs and damaged files of a folder, without valid JSON of other formats."""
    runs = []
    for path in saved_runs_in(folder):
        with contextlib.suppress(BaselineError):
            if not NUMBERED.fullmatch(path.name) and of_another_kind(path, document_in(content_of(path), path)):
                continue
        runs.append(path)
    return runs


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _refuse(line: str) -> int:
    _say(line)
    return ExitCode.REFUSED
