"""Measure the resolved sets on this machine: one `pytest perf` per set, with its run and its outcome in the folder of the label.

LABEL, SETS, BATCH, SHA, AGAINST and BASELINES come from the job that resolved them. DEVICE defaults to cuda. MORE has further
options of pytest, in the quoting of a shell but without one. The exit status is that of the worst outcome.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from outcomes import PYTEST_FAILURES, RUN, STATUS, Outcome, check, exit_code
from resolve import request
from workflow import AA, ROOT, SHA, Refusal, main, out_folder, series, setting

from perf.analysis.verdicts import ExitCode

LOG = "pytest.log"
REASONS = 3  # of a failure, at most
# Usage errors, a refused session, an invalid configuration, and the last line of any other error.
REASON = re.compile(r"^(?:ERROR: |! _pytest\.outcomes\.Exit: |(?=INVALID )|E   )(\S.*?)(?: !)?$", re.MULTILINE)


def pytest_perf(options: list[str], run: Path, storage: Path) -> int:
    """Run one session and return its exit code. The run is written outside the storage: it is no baseline by itself."""
    storage.mkdir(parents=True, exist_ok=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "perf", "-p", "no:cacheprovider", *options]
    command += [f"--benchmark-storage=file://{storage}", f"--benchmark-json={run}"]
    print(f"$ {shlex.join(command)}", flush=True)
    with (run.parent / LOG).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        for line in process.stdout or ():
            print(line, end="", flush=True)
            log.write(line)
        code = process.wait()
    if run.is_file() and not run.stat().st_size:  # pytest creates it before it measures
        run.unlink()
    return code


def reasons_of(code: int, log: Path) -> tuple[str, ...]:
    """The reasons of this exit code: those that pytest printed, else the meaning of the code."""
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    printed = [match[1].strip()[:300] for match in REASON.finditer(text)]
    return tuple(dict.fromkeys(printed))[:REASONS] or (PYTEST_FAILURES.get(code, f"pytest exited with {code}"),)


def merge_base(reference: str) -> str:
    """Return the common ancestor of this tree and another commit. Raises Refusal where there is none, or it is this tree."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    done = git("merge-base", "--end-of-options", reference, "HEAD")
    commit = done.stdout.strip()
    if done.returncode or not SHA.fullmatch(commit):
        raise Refusal(f"this commit and {reference} have no commit in common: {done.stderr.strip()[:200]}")
    if commit == git("rev-parse", "HEAD").stdout.strip():
        raise Refusal(f"this commit is part of {reference}, so there is no change to measure: name one of a branch")
    return commit


def record_environment(out: Path, device: str) -> None:
    """Write the installed packages and the checks of `perf doctor`. Raises Refusal where the machine cannot measure."""
    packages = sorted(f"{package.metadata['Name']}=={package.version}" for package in metadata.distributions())
    (out / "environment.txt").write_text("\n".join(packages) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "perf", "doctor", "--json", "--no-compile", "--device", device]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=False)
    (out / "doctor.json").write_bytes(done.stdout)
    if done.returncode:
        raise Refusal("the machine is not fit to measure (perf doctor)")


def measure(name: str, batches: tuple[int, ...], out: Path, baselines: Path, against: str | None) -> Outcome:
    """Measure one set and return its outcome."""
    label, folder = setting("LABEL"), out / series(name, batches)
    stored = baselines / label / folder.name
    # A paired session contains its own comparison. Stored A/A sessions give it the margin of this machine.
    history = baselines / label / AA if against else stored
    storage = Path(setting("RUNNER_TEMP")) / "storage" / folder.name
    shutil.rmtree(storage, ignore_errors=True)
    if history.is_dir():
        shutil.copytree(history, storage)
    options = ["-m", name, "--device", setting("DEVICE", "cuda")]
    options += [part for batch in batches for part in ("--batch", str(batch))]
    options += shlex.split(os.environ.get("MORE", ""))
    options += ["--perf-against", against] if against else ["--benchmark-compare"]
    code = pytest_perf(options, folder / RUN, storage)
    reasons = () if code in STATUS else reasons_of(code, folder / LOG)
    outcome = Outcome(label, folder.name, setting("SHA"), code, reasons, against=against)
    return check(outcome, folder, None if against else stored)


def run() -> int:
    """Measure every set, whatever the outcome of the previous one."""
    label = setting("LABEL")
    requested = request(setting("SETS"), os.environ.get("BATCH", ""), label, setting("SHA"))
    out, baselines = out_folder(), Path(setting("BASELINES", "baselines")).absolute()
    try:
        record_environment(out, setting("DEVICE", "cuda"))
        reference = os.environ.get("AGAINST")
        against, unfit = merge_base(reference) if reference else None, ()
    except Refusal as refusal:
        against, unfit = None, (str(refusal),)
    outcomes = []
    for name in requested.sets:
        if unfit:
            outcome = Outcome(label, series(name, requested.batches), requested.sha, ExitCode.FAILED, unfit)
        else:
            outcome = measure(name, requested.batches, out, baselines, against)
        outcome.write(out / outcome.series)
        print("; ".join([f"{label} {outcome.series}: {outcome.status}", *outcome.reasons]), flush=True)
        outcomes.append(outcome)
    return exit_code(outcomes)


if __name__ == "__main__":
    sys.exit(main(run))
