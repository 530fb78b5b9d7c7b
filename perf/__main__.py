"""`python -m perf COMMAND`: what is done beside measuring. Each command's module is imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from perf.analysis.verdicts import ExitCode

# name -> (module, its function that adds arguments, its function that runs and returns the exit status, summary)
COMMANDS = {
    "doctor": ("perf.commands.doctor", "add_arguments", "run", "is this machine fit to measure?"),
    "battery": (
        "perf.commands.selftest",
        "add_arguments",
        "run",
        "does the gate work here? A/A and an injected slowdown",
    ),
    "gpu-run": ("perf.commands.gpu_run", "add_arguments", "run", "spend a short time on a borrowed GPU well"),
    "compare": ("perf.commands.compare", "add_arguments", "run", "judge one saved run against another"),
    "show": ("perf.commands.compare", "add_show_arguments", "run_show", "print a saved run"),
    "merge": ("perf.commands.merge", "add_arguments", "run", "join the saved runs of many machines in one folder"),
    "report": ("perf.commands.report", "add_arguments", "run", "plots, tables and one page from saved runs"),
}


class Parser(argparse.ArgumentParser):
    """argparse's own usage errors exit with 2; ours is the one of perf.analysis.verdicts.ExitCode."""

    def error(self, message: str):
        self.print_usage(sys.stderr)
        self.exit(ExitCode.REFUSED, f"{self.prog}: error: {message}\n")


def main(argv=None) -> int:
    """Run a command; returns its exit status (perf.analysis.verdicts.ExitCode)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="python -m perf", description=__doc__.split(":")[1].split(".")[0].strip())
    # By name: what reads saved runs has nothing else to do with the model.
    version = importlib.import_module("sd").__version__
    parser.add_argument("--version", action="version", version=f"sd-perf {version}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, add, _, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:
            getattr(importlib.import_module(module), add)(command)
    arguments = parser.parse_args(argv)
    module, _, run, _ = COMMANDS[arguments.command]
    try:
        return getattr(importlib.import_module(module), run)(arguments)
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK


if __name__ == "__main__":
    raise SystemExit(main())
