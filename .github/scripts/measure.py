"""Measure what was resolved, on this machine: one `pytest perf` a set, each with its run and its outcome in $OUT.

LABEL, SETS, BATCH, SHA, AGAINST and BASELINES come from the job that resolved them; DEVICE is cuda unless it is set, and
MORE has further options of pytest, in a shell's quoting but never through a shell. The exit status is the worst outcome.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import outcomes
from house import AA, ROOT, SHA, Refusal, given, main, out_folder, series
from outcomes import PYTEST_SAYS, RUN, Outcome
from resolve import request

from perf.analysis.verdicts import ExitCode


def pytest_perf(options: list[str], run: Path, storage: Path) -> int:
    """One session. Its run is written beside the storage, not into it: what compares never becomes the baseline by itself."""
    storage.mkdir(parents=True, exist_ok=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "perf", "-p", "no:cacheprovider", *options]
    command += [f"--benchmark-storage=file://{storage}", f"--benchmark-json={run}"]
    print(f"$ {shlex.join(command)}", flush=True)
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if run.is_file() and not run.stat().st_size:  # made when pytest started, and nothing was measured
        run.unlink()
    return code


def merge_base(reference: str) -> str:
    """The commit that this tree and another one have in common. Raises Refusal."""
    done = subprocess.run(
        ["git", "merge-base", "--end-of-options", reference, "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = done.stdout.strip()
    if done.returncode or not SHA.fullmatch(found):
        raise Refusal(f"this commit and {reference} have no commit in common: {done.stderr.strip()[:200]}")
    return found


def record_environment(out: Path, device: str) -> None:
    """What is installed, and what `perf doctor` finds. Raises Refusal where it says that nothing can be measured."""
    names = sorted(f"{one.metadata['Name']}=={one.version}" for one in metadata.distributions())
    (out / "environment.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "perf", "doctor", "--json", "--no-compile", "--device", device]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=False)
    (out / "doctor.json").write_bytes(done.stdout)
    if done.returncode:
        raise Refusal("the machine is not fit to measure (perf doctor)")


def measure(name: str, batches: tuple[int, ...], out: Path, baselines: Path, against: str | None) -> Outcome:
    """Measure one set and say what came of it."""
    label, folder = given("LABEL"), out / series(name, batches)
    stored = baselines / label / folder.name
    # A pull request is compared inside its session; the stored ones only tell it this machine's noise.
    noise = stored if against is None else baselines / label / AA
    scratch = out.parent / "storage" / folder.name
    shutil.rmtree(scratch, ignore_errors=True)
    if noise.is_dir():
        shutil.copytree(noise, scratch, symlinks=False)
    options = ["-m", name, "--device", given("DEVICE", "cuda")]
    options += [part for batch in batches for part in ("--batch", str(batch))]
    options += shlex.split(os.environ.get("MORE", ""))
    options += ["--perf-against", against] if against else ["--benchmark-compare"]
    code = pytest_perf(options, folder / RUN, scratch)
    words = () if code in outcomes.KINDS else (PYTEST_SAYS.get(code, f"pytest ended with {code}"),)
    made = Outcome(label, folder.name, given("SHA"), code, reasons=words, against=against)
    return outcomes.examine(made, folder, stored if against is None else None)


def run() -> int:
    """Measure every set, whatever came of the one before."""
    asked = request(given("SETS"), os.environ.get("BATCH", ""), given("LABEL"), given("SHA"))
    out, baselines = out_folder(), Path(given("BASELINES", "baselines")).absolute()
    found, refused = [], None
    try:
        record_environment(out, given("DEVICE", "cuda"))
        reference = os.environ.get("AGAINST")
        against = merge_base(reference) if reference else None
    except Refusal as refusal:
        refused = str(refusal)
    for name in asked.sets:
        if refused is None:
            one = measure(name, asked.batches, out, baselines, against)
        else:
            one = Outcome(given("LABEL"), series(name, asked.batches), asked.sha, ExitCode.FAILED, reasons=(refused,))
        one.write(out / one.series)
        print(f"{one.label} {one.series}: {one.kind}{''.join(f'; {words}' for words in one.reasons)}", flush=True)
        found.append(one)
    return outcomes.exit_code(found)


if __name__ == "__main__":
    sys.exit(main(run))
