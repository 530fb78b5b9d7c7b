"""The step of the composite action: the suite on another repository's checkpoint. Inputs are INPUT_* in the environment.

Outputs: verdict (SLOWER, FASTER, SAME, INCONCLUSIVE or INVALID, the worst there is; `measured` where nothing was compared;
`could not measure`), exit-code (perf.analysis.verdicts.ExitCode) and run, the file of the saved run. The step exits as pytest does.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import outcomes
import words
from house import NAME, Refusal, given, main, output, summary
from measure import pytest_perf
from outcomes import KINDS, PYTEST_SAYS, UNMEASURED
from resolve import request

from perf.configurations.configuration import CHOICES
from perf.report.results import read_session
from perf.report.summary import WORST_FIRST, markdown_summary
from perf.runs.saved_run import BaselineError, read
from perf.runs.storage import save_numbered

READ_AT_ONCE = 1 << 20


def inputs() -> tuple[list[str], str | None]:
    """(pytest's options, what to compare with: None for nothing, empty for all stored sessions). Raises Refusal."""
    options = []
    model, checkpoint = given("INPUT_MODEL", ""), given("INPUT_CKPT", "")
    name = given("INPUT_SET", "")
    asked = request(name or "smoke", given("INPUT_BATCH", ""))
    if name:
        options += ["-m", asked.sets[0]]
    if len(asked.sets) != 1:
        raise Refusal("the input set names one set")
    if model:
        if model not in CHOICES["model"]:
            raise Refusal(f"there is no model {model[:60]!r}: choose from {', '.join(CHOICES['model'])}")
        options += ["--model", model]
    if checkpoint:
        options += ["--ckpt", str(weights(checkpoint))]
    options += [part for batch in asked.batches for part in ("--batch", str(batch))]
    compare = given("INPUT_COMPARE", "false")
    if compare not in ("true", "false") and not NAME.fullmatch(compare):
        raise Refusal("the input compare is true, false or the name of a stored run")
    try:
        options += shlex.split(given("INPUT_ARGUMENTS", ""))  # quoting as a shell has it, and no shell
    except ValueError as error:
        raise Refusal(f"the input arguments cannot be taken apart: {error}") from None
    return options, {"true": "", "false": None}.get(compare, compare)


def weights(text: str) -> Path:
    """The checkpoint, by its path in the workspace or on the machine, and the one that its sum promises. Raises Refusal."""
    path = (workspace() / text).resolve()
    if not path.exists():
        raise Refusal(f"the input ckpt: there is no {path}")
    wanted = given("INPUT_CKPT_SHA256", "").lower()
    if not wanted:
        return path
    if not re.fullmatch(r"[0-9a-f]{64}", wanted) or not path.is_file():
        raise Refusal("the input ckpt-sha256 is 64 hex digits, of a file")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(READ_AT_ONCE):
            digest.update(chunk)
    if digest.hexdigest() != wanted:
        raise Refusal(f"the checkpoint has the sum {digest.hexdigest()}, not the one of ckpt-sha256")
    return path


def workspace() -> Path:
    """Where the caller's repository is checked out."""
    return Path(given("GITHUB_WORKSPACE")).absolute()


def verdict(code: int, run: Path) -> str:
    """The worst verdict of a run, in one word."""
    if code not in KINDS:
        return UNMEASURED
    found = {one.verdict for one in outcomes.decisions(read(run))}
    return next((one.value for one in WORST_FIRST if one in found), "measured")


def run() -> int:
    """Measure, and write the outputs whatever came of it."""
    folder = Path(given("RUNNER_TEMP")).absolute() / "sd-perf"
    shutil.rmtree(folder, ignore_errors=True)
    file, storage = folder / "run.json", workspace() / given("INPUT_STORAGE", ".benchmarks")
    code, said, reason = 4, UNMEASURED, ""
    try:
        options, compare = inputs()
        if compare is not None:
            options.append(f"--benchmark-compare={compare}" if compare else "--benchmark-compare")
        code = pytest_perf(options, file, storage)
        reason = PYTEST_SAYS.get(code, f"pytest ended with {code}")
        said = verdict(code, file)
        if code in KINDS:
            session, results = read_session(file)
            reason = markdown_summary([session], results)
            if compare is None:  # what is compared never becomes what the next one is compared with
                save_numbered(storage, given("GITHUB_SHA", "run")[:12], file.read_text(encoding="utf-8"))
    except BaselineError as error:
        code, said, reason = 1 if code in KINDS else code, UNMEASURED, str(error)
    finally:
        output("verdict", said)
        output("exit-code", str(code))
        output("run", str(file) if file.is_file() else "")
    summary(reason if code in KINDS and said != UNMEASURED else f"## perf: {UNMEASURED}\n\n{words.markdown(reason)}")
    return code


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main(run))
