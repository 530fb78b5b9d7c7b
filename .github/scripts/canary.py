"""Verify that the gate can fail: an injected slowdown of 5 % must be SLOWER, and the same session without it must be SAME.

Both trials use the commands of every measurement: `pytest perf`, its verdicts, its exit code. Each compares one configuration
under two labels in one session.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from measure import pytest_perf, record_environment
from outcomes import PYTEST_FAILURES, RUN, STATUS, Outcome, decisions, exit_code, without_path
from workflow import AA, Refusal, add_to_summary, machine, main, out_folder, setting

from perf.analysis.verdicts import ExitCode, Verdict
from perf.report.text import markdown
from perf.runs.saved_run import BaselineError, read

SLOWDOWN = "0.05"
CONFIGURATION = "--model sd2 --attention sdpa --batch 1 --steps 20"
# series -> further options, expected exit code, expected verdict
TRIALS = {
    AA: ((), ExitCode.OK, Verdict.SAME),
    "canary": ((f"--perf-inject-slowdown={SLOWDOWN}",), ExitCode.SLOWER, Verdict.SLOWER),
}


def trial(series: str, out: Path) -> Outcome:
    """Run one session, and compare its exit code and verdicts with the expected ones."""
    more, expected_code, expected = TRIALS[series]
    path = out / series / RUN
    selection = (
        f"{os.environ.get('WHAT') or CONFIGURATION} --device {setting('DEVICE', 'cuda')} {os.environ.get('MORE', '')}"
    )
    options = ["-m", "matrix", *shlex.split(selection), "--perf-aa", *more]
    code = pytest_perf(options, path, Path(setting("RUNNER_TEMP")) / "storage" / series)
    failed = Outcome(setting("LABEL"), series, setting("GITHUB_SHA"), ExitCode.FAILED, has_run=path.is_file())
    if code not in (*STATUS, ExitCode.FAILED):
        return failed.failed(PYTEST_FAILURES.get(code, f"pytest exited with {code}"))
    try:
        session = read(path)
    except BaselineError as error:
        return failed.failed(f"no valid run: {without_path(error, path)}")
    if code == ExitCode.FAILED:  # a noisy machine is no evidence against the gate
        return failed.failed(f"could not measure: {session.invalid or PYTEST_FAILURES[1]}")
    verdicts = {decision.verdict for decision in decisions(session)}
    names = ", ".join(sorted(verdict.value for verdict in verdicts)) or "no verdict"
    result = f"{names} with exit code {code}"
    if code == expected_code and verdicts == {expected}:
        return replace(failed, exit_code=ExitCode.OK, reasons=(f"{result}, as expected",))
    return failed.failed(f"THE GATE DOES NOT WORK: {result}, expected {expected.value}")


def run() -> int:
    """Run both trials, whatever the outcome of the first."""
    machine(setting("LABEL"))
    out = out_folder()
    try:
        record_environment(out, setting("DEVICE", "cuda"))
        outcomes = [trial(series, out) for series in TRIALS]
    except Refusal as refusal:
        unfit = Outcome(setting("LABEL"), "-", setting("GITHUB_SHA"), ExitCode.FAILED, (str(refusal),))
        outcomes = [replace(unfit, series=series) for series in TRIALS]
    for outcome in outcomes:
        outcome.write(out / outcome.series)
    lines = [f"{outcome.label} {outcome.series}: {'; '.join(outcome.reasons)}" for outcome in outcomes]
    status = exit_code(outcomes)
    print("\n".join(lines), flush=True)
    title = "the gate works" if status == ExitCode.OK else "the gate is not shown to work"
    add_to_summary(f"## canary: {title}\n\n" + "\n".join(f"- {markdown(line)}" for line in lines))
    return status


if __name__ == "__main__":
    sys.exit(main(run))
