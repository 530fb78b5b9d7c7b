"""Can the gate fail? A slowdown of 5 % is injected and must come back SLOWER; without it the same must come back SAME.

Both go the way that every measurement goes: `pytest perf`, its verdicts, its exit code. One configuration is enough, in
two labels that take turns in one session. A detector that is never seen to detect is one that has been silenced.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import outcomes
from house import AA, Refusal, given, machine, main, out_folder, summary
from measure import pytest_perf, record_environment
from outcomes import PYTEST_SAYS, RUN, Outcome

from perf.analysis.verdicts import ExitCode, Verdict
from perf.report.text import markdown
from perf.runs.saved_run import BaselineError, read

SLOWDOWN = "0.05"
WHAT = ("--model", "sd2", "--attention", "sdpa", "--batch", "1", "--steps", "20")
# series -> further options, the exit code that is right, the verdict that is
TRIALS = {
    AA: ((), ExitCode.OK, Verdict.SAME),
    "canary": ((f"--perf-inject-slowdown={SLOWDOWN}",), ExitCode.SLOWER, Verdict.SLOWER),
}


def trial(series: str, out: Path) -> Outcome:
    """One session, and whether the gate said what it must."""
    more, right_code, right = TRIALS[series]
    what = shlex.split(os.environ["WHAT"]) if os.environ.get("WHAT") else WHAT
    options = ["-m", "matrix", *what, "--device", given("DEVICE", "cuda"), *shlex.split(os.environ.get("MORE", ""))]
    code = pytest_perf([*options, "--perf-aa", *more], out / series / RUN, out.parent / "storage" / series)
    made = Outcome(given("LABEL"), series, given("GITHUB_SHA"), ExitCode.FAILED)
    if code not in (*outcomes.KINDS, ExitCode.FAILED):
        return _replaced(made, PYTEST_SAYS.get(code, f"pytest ended with {code}"), out / series)
    try:
        session = read(out / series / RUN)
        verdicts = [one.verdict for one in outcomes.decisions(session)]
    except BaselineError as error:
        return _replaced(made, f"it left no run that can be read: {str(error).rpartition('/')[2]}", out / series)
    if code == ExitCode.FAILED:  # a machine that was not quiet says nothing about the gate
        return _replaced(made, f"could not measure: {session.invalid or PYTEST_SAYS[1]}", out / series)
    said = ", ".join(one.value for one in verdicts) or "no verdict"
    if code == right_code and verdicts and all(one is right for one in verdicts):
        return Outcome(made.label, series, made.sha, ExitCode.OK, (f"came back {said}, as it must",), has_run=True)
    return _replaced(made, f"THE GATE DOES NOT WORK: came back {said} and exit {code}, not {right.value}", out / series)


def _replaced(made: Outcome, reason: str, folder: Path) -> Outcome:
    return Outcome(made.label, made.series, made.sha, made.exit_code, (reason,), has_run=(folder / RUN).is_file())


def run() -> int:
    """Both trials, whatever came of the first."""
    machine(given("LABEL"))
    out, found = out_folder(), []
    try:
        record_environment(out, given("DEVICE", "cuda"))
    except Refusal as refusal:
        found = [Outcome(given("LABEL"), one, given("GITHUB_SHA"), ExitCode.FAILED, (str(refusal),)) for one in TRIALS]
    found = found or [trial(series, out) for series in TRIALS]
    status = outcomes.exit_code(found)
    lines = [f"{one.label} {one.series}: {'; '.join(one.reasons)}" for one in found]
    for one in found:
        one.write(out / one.series)
    print("\n".join(lines), flush=True)
    listed = "\n".join(f"- {markdown(line)}" for line in lines)
    summary(f"## canary: the gate {'works' if status == ExitCode.OK else 'has not been seen to work'}\n\n{listed}")
    return status


if __name__ == "__main__":
    sys.exit(main(run))
