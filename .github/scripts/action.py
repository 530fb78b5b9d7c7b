"""Step of the composite action: run the suite on another repository's checkpoint. Inputs are INPUT_* in the environment.

Outputs: verdict (the worst of SLOWER, FASTER, SAME, INCONCLUSIVE and INVALID; `measured` without a comparison; `could not
measure`), exit-code (perf.analysis.verdicts.ExitCode), reason (of a failure), run, the path of the saved run, and report, the
folder of the page. The step exits as pytest does.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from measure import LOG, pytest_perf, reasons_of
from outcomes import STATUS, UNMEASURED, decisions
from resolve import request
from workflow import NAME, Refusal, add_to_summary, main, output, setting

from perf.configurations.configuration import CHOICES
from perf.report.results import read_session
from perf.report.summary import WORST_FIRST, markdown_summary
from perf.report.text import markdown
from perf.runs.fingerprints import sha256
from perf.runs.saved_run import BaselineError
from perf.runs.storage import save_numbered, write_atomically


def inputs() -> tuple[list[str], bool]:
    """Return pytest's options, and whether they compare with stored runs. Raises Refusal for an invalid input."""
    options = []
    name, model, checkpoint = (setting(input, "") for input in ("INPUT_SET", "INPUT_MODEL", "INPUT_CKPT"))
    requested = request(name or "smoke", setting("INPUT_BATCH", ""))
    if len(requested.sets) != 1:
        raise Refusal("the input set names one set")
    if name:
        options += ["-m", requested.sets[0]]
    if model:
        if model not in CHOICES["model"]:
            raise Refusal(f"there is no model {model[:60]!r}: choose from {', '.join(CHOICES['model'])}")
        options += ["--model", model]
    if checkpoint:
        options += ["--ckpt", str(verified(workspace() / checkpoint))]
    if config := setting("INPUT_CONFIG", ""):
        options += ["--config", str(existing("config", config))]
    for option, values in (("--steps", setting("INPUT_STEPS", "")), ("--attention", setting("INPUT_ATTENTION", ""))):
        options += [part for value in values.split() for part in (option, value)]
    if engine := setting("INPUT_ENGINE", ""):
        path, colon, name = engine.partition(":")
        options += ["--engine", f"{existing('engine', path)}{colon}{name}" if path.endswith(".py") else engine]
    if setting("INPUT_REPORT", "true") == "true":
        options.append(f"--perf-report={folder() / 'report'}")
    options += [part for batch in requested.batches for part in ("--batch", str(batch))]
    compare = setting("INPUT_COMPARE", "false")
    if not NAME.fullmatch(compare):
        raise Refusal("the input compare is true, false or the name of a stored run")
    try:
        options += shlex.split(setting("INPUT_ARGUMENTS", ""))  # the quoting of a shell, without a shell
    except ValueError as error:
        raise Refusal(f"the input arguments has invalid quoting: {error}") from None
    if compare != "false":
        options.append("--benchmark-compare" + ("" if compare == "true" else f"={compare}"))
    return options, compare != "false"


def verified(path: Path) -> Path:
    """Return the path of a checkpoint that has the SHA-256 of the input ckpt-sha256. Raises Refusal."""
    path = path.resolve()
    if not path.exists():
        raise Refusal(f"the input ckpt: there is no {path}")
    expected = setting("INPUT_CKPT_SHA256", "").lower()
    if not expected:
        return path
    if not re.fullmatch(r"[0-9a-f]{64}", expected) or not path.is_file():
        raise Refusal("the input ckpt-sha256 is 64 hex digits, of a file")
    if sha256(path) != expected:
        raise Refusal(f"the checkpoint has the SHA-256 {sha256(path)}, not that of ckpt-sha256")
    return path


def existing(name: str, path: str) -> Path:
    """The path of a file of the workspace. Raises Refusal."""
    file = (workspace() / path).resolve()
    if not file.is_file():
        raise Refusal(f"the input {name}: there is no {file}")
    return file


def folder() -> Path:
    """The folder of what the step writes."""
    return Path(setting("RUNNER_TEMP")).absolute() / "sd-perf"


def with_commit(file: Path) -> None:
    """Write the commit of the calling repository into a saved run, where pytest has put that of the action."""
    from perf.plugin.preflight import commit_of

    document = json.loads(file.read_text(encoding="utf-8"))
    write_atomically(file, {**document, "commit_info": commit_of(workspace())})


def workspace() -> Path:
    """Return the checkout of the calling repository."""
    return Path(setting("GITHUB_WORKSPACE")).absolute()


def run() -> int:
    """Measure, and write the outputs in every case."""
    shutil.rmtree(folder(), ignore_errors=True)
    file, storage = folder() / "run.json", workspace() / setting("INPUT_STORAGE", ".benchmarks")
    code, verdict, text, reason = 4, UNMEASURED, "", ""
    try:
        options, compared = inputs()
        code = pytest_perf(options, file, storage)
        if code in STATUS:
            with_commit(file)
            session, results = read_session(file)
            verdicts = {decision.verdict for decision in decisions(session.saved)}
            verdict = next((worst.value for worst in WORST_FIRST if worst in verdicts), "measured")
            text = markdown_summary([session], results)
            if not compared:  # a compared run must not become the next baseline
                save_numbered(storage, setting("GITHUB_SHA", "run")[:12], file.read_text(encoding="utf-8"))
        else:
            reason = "; ".join(reasons_of(code, folder() / LOG))
    except (BaselineError, Refusal) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, Refusal):
            raise
        code, verdict = 1, UNMEASURED
    finally:
        if verdict == UNMEASURED:
            text = f"## perf: {UNMEASURED}\n\n{markdown(reason)}\n"
        folder().mkdir(parents=True, exist_ok=True)
        (folder() / "comment.md").write_text(text, encoding="utf-8")
        add_to_summary(text)
        output("verdict", verdict)
        output("exit-code", str(code))
        output("reason", reason)
        output("run", str(file) if file.is_file() else "")
        report = folder() / "report"
        output("report", str(report) if (report / "index.html").is_file() else "")
    return code


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main(run))
