"""`python -m perf run SET`: measure a set, as `pytest perf -m SET` does in a clone."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from perf.analysis.verdicts import ExitCode
from perf.commands.sets import unknown_set
from perf.configurations.project import ProjectError, find_root, read_project
from perf.configurations.sets import SETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `run`."""
    parser.add_argument("set", metavar="SET", help="a set of `sd-perf list`")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="options of pytest perf")


def run(args: argparse.Namespace) -> int:
    """The exit status of pytest, or 4 for an unknown set."""
    try:
        project = read_project(find_root(Path.cwd()))
    except ProjectError as error:
        print(error, file=sys.stderr)
        return ExitCode.REFUSED
    if args.set not in {**SETS, **project.sets}:
        print(unknown_set(args.set, project), file=sys.stderr)
        return ExitCode.REFUSED
    process = subprocess.Popen(command(args.set, args.arguments))
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # pytest has it too, saves what it measured, and exits
            continue


def command(name: str, arguments: list[str]) -> list[str]:
    """The command line of pytest, which works in a clone and outside."""
    suite = ["-p", "perf.plugin", "--pyargs", "perf.test_txt2img"]
    return [sys.executable, "-m", "pytest", *suite, "-m", name, *arguments]
