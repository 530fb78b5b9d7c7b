"""The commands of `python -m perf`, and the parser of their options."""

from __future__ import annotations

import argparse
import sys

from perf.analysis.verdicts import ExitCode

# name -> (module with `add_arguments(parser)` and `run(arguments) -> exit status`, summary)
COMMANDS = {
    "list": ("perf.commands.sets", "list the sets of configurations, or the configurations of a set"),
    "run": ("perf.commands.run_set", "measure a set"),
    "submit": ("perf.commands.submit", "send the tasks of a fleet to Slurm"),
    "doctor": ("perf.commands.doctor", "check whether this machine is fit to measure"),
    "battery": ("perf.commands.selftest", "test the regression gate on this machine: A/A and an injected slowdown"),
    "unfinished": ("perf.commands.unfinished", "list the interrupted sessions, or drop them by name"),
    "compare": ("perf.commands.compare", "judge one saved run against another"),
    "history": ("perf.commands.history", "find the sessions from which on a configuration is slower or faster"),
    "show": ("perf.commands.show", "print saved runs"),
    "merge": ("perf.commands.merge", "join the saved runs of many machines in one folder"),
    "report": ("perf.commands.report", "write plots, tables and one page from saved runs"),
    "completion": ("perf.commands.completion", "print a script that completes these commands in a shell"),
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose usage errors exit with ExitCode.REFUSED rather than argparse's 2."""

    def error(self, message: str):
        self.print_usage(sys.stderr)
        self.exit(ExitCode.REFUSED, f"{self.prog}: error: {message}\n")
