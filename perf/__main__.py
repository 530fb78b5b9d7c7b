"""`python -m perf COMMAND`: the commands beside `pytest perf`, each imported only when it runs."""

from __future__ import annotations

import importlib
import os
import sys

from perf.analysis.verdicts import ExitCode
from perf.commands import COMMANDS, Parser


def main(argv=None) -> int:
    """Run a command; returns its exit status (perf.analysis.verdicts.ExitCode)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="sd-perf", description="The commands beside `pytest perf`.")
    version = importlib.import_module("sd").__version__  # by name: perf imports sd statically in the worker only
    parser.add_argument("--version", action="version", version=f"sd-perf {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:
            importlib.import_module(module).add_arguments(command)
    if empty := _empty_value(argv):
        parser.error(f"{empty}: the value is empty; is a variable unset?")
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return ExitCode.OK
    try:
        return importlib.import_module(COMMANDS[arguments.command][0]).run(arguments)
    except BrokenPipeError:  # stdout was closed by the reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK


def _empty_value(argv: list[str]) -> str | None:
    """The first option or argument with an empty value, such as `--output=$UNSET` leaves in a CI script."""
    for before, text in zip(["", *argv], argv):
        option, equals, value = text.partition("=")
        if option.startswith("--") and equals and not value:
            return option
        if not text.strip():
            return before if before.startswith("-") else "an argument"
    return None


if __name__ == "__main__":
    raise SystemExit(main())
