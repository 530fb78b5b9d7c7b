"""`python -m perf list`: the sets of configurations, ours and those of the configuration file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from perf.analysis.verdicts import ExitCode
from perf.configurations.project import Project, ProjectError, find_root, read_project
from perf.configurations.sets import SETS, SUMMARIES, describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `list`."""
    parser.add_argument("sets", nargs="*", metavar="SET", help="print the configurations of these sets")
    parser.add_argument("--json", action="store_true", help="print JSON, with all fields of the configurations")


def run(args: argparse.Namespace) -> int:
    """Print every set with a sentence, or the configurations of the named ones. Returns 4 for an unknown set."""
    try:
        project = read_project(find_root(Path.cwd()))
        chosen = {name: {**SETS, **project.sets}[name] for name in args.sets or {**SETS, **project.sets}}
    except ProjectError as error:
        print(error, file=sys.stderr)
        return ExitCode.REFUSED
    except KeyError as error:
        print(unknown_set(str(error.args[0]), project), file=sys.stderr)
        return ExitCode.REFUSED
    summaries = {**SUMMARIES, **project.summaries}
    if args.json:
        print(
            json.dumps(
                {
                    "sets": {
                        name: {
                            "summary": summaries[name],
                            "configurations": [
                                {**each.as_dict(), "sentence": describe(each)} for each in configurations
                            ],
                        }
                        for name, configurations in chosen.items()
                    },
                    "engines": project.engines,
                }
            )
        )
        return ExitCode.OK
    width = max(map(len, chosen))
    for name, configurations in chosen.items():
        print(f"{name:<{width}}  {len(configurations):>2}  {summaries[name]}")
        for configuration in configurations if args.sets else ():
            print(f"    {configuration.id:<50}  {describe(configuration)}")
    if not args.sets:
        print("\n`sd-perf list SET` prints its configurations, and `sd-perf run SET` measures them.")
    return ExitCode.OK


def unknown_set(name: str, project: Project) -> str:
    """The message for a set that does not exist."""
    return f"there is no set {name!r}: choose from {', '.join({**SETS, **project.sets})}"
