"""`python -m perf unfinished`: list the interrupted sessions of this machine, or drop some of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from perf.analysis.verdicts import ExitCode
from perf.session.journal import is_running, unfinished
from perf.session.resume import named
from perf.session.settings import SessionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `unfinished`."""
    parser.add_argument("--storage", type=Path, default=Path(".benchmarks"), metavar="FOLDER", help="of saved runs")
    parser.add_argument("--drop", action="append", default=[], metavar="NAME", help="delete this session's rounds")


def run(args: argparse.Namespace) -> int:
    """Delete the named sessions, then print the others. Returns 4 if a name is unknown or its session runs, else 0."""
    try:
        paths = [named(args.storage, name) for name in args.drop]
    except SessionError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.REFUSED
    for path in paths:
        if is_running(path):
            print(f"error: {path.stem}: its session is running; stop it first", file=sys.stderr)
            return ExitCode.REFUSED
    for path in dict.fromkeys(paths):
        path.unlink()
        print(f"dropped {path.stem}")
    folders = sorted({path.parent for path in args.storage.rglob("*.jsonl")})
    sessions = [recorded for folder in folders for recorded in unfinished(folder)]
    for recorded in sessions:
        print(f"{recorded.path.parent}: {recorded}")
    if sessions:
        print("resume one by its command with --perf-resume=NAME, or drop it with --drop NAME")
    elif not paths:
        print(f"no unfinished session in {args.storage}")
    return ExitCode.OK
