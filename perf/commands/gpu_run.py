"""`python -m perf gpu-run`: a short time on a borrowed GPU, well spent.

Correctness first, then the published experiment, then what is newest, in the order of what each step is worth. A call ends
within `--chunk`, all calls together within `--budget`; what was cut off goes on in the next call, from the journal. Everything
is written under `--out` as it happens: saved runs, reference pictures, journals, the compile cache, one log a step.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from perf.analysis.verdicts import ExitCode
from perf.runs.storage import write_atomically

GRACE_SECONDS = 30.0  # for an interrupted pytest to save what it has
INTERRUPTED = 2  # pytest's exit code after Ctrl-C


@dataclass(frozen=True)
class Step:
    """One pytest run. worth: why it has its place in the order."""

    name: str
    arguments: tuple[str, ...]
    worth: str
    measures: bool = True


# Not all that is marked so: perf/test_peers.py measures on a CPU.
PEERS = ("perf/test_txt2img.py", "-m", "peers", "--model", "sd2")
STEPS = (
    Step("correctness", ("tests", "-m", "gpu", "-rp"), "a fast wrong picture is worth nothing", measures=False),
    Step("published-1", ("perf", "-m", "published", "--batch", "1"), "the article's five, at batch 1"),
    Step("fast", ("perf", "--model", "sd2", "--optimise", "fast", "--batch", "1"), "how fast it gets"),
    Step("peers-1", (*PEERS, "--batch", "1"), "the same work by diffusers"),
    Step("ladder", ("perf", "-m", "ladder"), "what each optimisation gives"),
    Step("scopes", ("perf", "-m", "scopes"), "whether the loop as one is faster than step by step"),
    Step(
        "fast-batches",
        ("perf", "--model", "sd2", "--optimise", "fast", "--batch", "8", "--batch", "16"),
        "how much it gets done",
    ),
    Step("peers-8", (*PEERS, "--batch", "8"), "and by diffusers"),
    Step("fast-768", ("perf", "--model", "sd2-v", "--optimise", "fast", "--batch", "1"), "at 768 pixels"),
    Step("published-2-4", ("perf", "-m", "published", "--batch", "2", "--batch", "4"), "the article's other batches"),
    Step("batches", ("perf", "-m", "batches"), "every attention"),
    Step("published-sd1", ("perf", "-m", "published_sd1"), "the companion article"),
    Step("inductor", ("perf", "-m", "inductor"), "which option of the code generator is worth its time"),
    Step("approximate", ("perf", "-m", "approximate"), "what another picture would buy"),
)


def seconds(text: str) -> float:
    """`25m`, `90s`, `1.5h` or plain seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: give seconds, or a number with s, m or h behind it")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--budget", type=seconds, default=1500.0, help="of all calls together, such as 25m")
    parser.add_argument("--chunk", type=seconds, default=540.0, help="of this call, such as 9m")
    parser.add_argument(
        "--out", type=Path, required=True, help="where everything is written; give the same again to go on"
    )
    parser.add_argument("--model", help="another model in every step: tiny tries the whole run on a CPU")
    parser.add_argument("--only", action="append", choices=[step.name for step in STEPS], help="only this step")
    parser.add_argument("--launches", type=int, default=6, help="launches per configuration (default: 6)")


def run(arguments: argparse.Namespace) -> int:
    """Run steps until the chunk or the budget ends; 0 when all that ran was well, 1 when a step failed."""
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    state = _state(out)
    begin = time.monotonic()
    spent_before = sum(step["seconds"] for step in state.values())
    for step in STEPS:
        if arguments.only and step.name not in arguments.only:
            continue
        known = state.setdefault(step.name, {"status": "new", "exit_code": None, "seconds": 0.0})
        if known["status"] == "done":
            continue
        used = time.monotonic() - begin
        left = min(arguments.chunk - used, arguments.budget - spent_before - used) - GRACE_SECONDS
        if left <= 0:
            break
        print(f"{step.name} ({step.worth}): at most {left:.0f} s", flush=True)
        started, resume = time.monotonic(), known["status"] == "cut off"
        known.update(status="cut off", exit_code=INTERRUPTED)  # until its end, whatever ends this process before that
        try:
            code = _run(step, out, arguments, resume, limit=left)
            if code is not None:  # what pytest could not begin, by its options, is begun anew
                known.update(status="new" if code == ExitCode.REFUSED else "done", exit_code=code)
        finally:
            known["seconds"] += time.monotonic() - started
            write_atomically(out / "state.json", state)
    return _report(state, arguments)


def _state(out: Path) -> dict[str, dict]:
    path = out / "state.json"
    if not path.exists():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        known = {step.name for step in STEPS}
        return {name: one for name, one in state.items() if name in known and one["seconds"] >= 0}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SystemExit(f"{path}: cannot be read; delete it to begin again, the saved runs stay") from None


def _run(step: Step, out: Path, arguments: argparse.Namespace, resume: bool, limit: float) -> int | None:
    """pytest's exit status, or None where the limit cut it off."""
    command, said = [sys.executable, "-m", "pytest", *step.arguments], out / f"{step.name}.log"
    if step.measures:
        command += [f"--benchmark-storage=file://{out / step.name}", f"--benchmark-save={step.name}"]
        command += [f"--perf-compile-cache={out / 'compile-cache'}", f"--perf-launches={arguments.launches}"]
        if arguments.model and "--model" in command:
            command[command.index("--model") + 1] = arguments.model
        elif arguments.model:
            command += ["--model", arguments.model]
        command += ["--perf-resume"] if resume else []
    elif resume:
        command += [f"@{_passed(said)}"]
    with open(said, "ab") as log:
        # Under nohup, or behind an & in a script, SIGINT is ignored, and a child would inherit that.
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_heed_interrupts)
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            _end(process)
        except KeyboardInterrupt:
            _end(process)
            raise
        return None


def _end(process: subprocess.Popen) -> None:
    """As Ctrl-C does: pytest saves what it has."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _passed(log: Path) -> Path:
    """A file of pytest's arguments that leave out the tests that passed before the step was cut off (from its `-rp`)."""
    passed = re.findall(r"^PASSED (.+)$", log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    file = log.with_suffix(".passed")
    file.write_text("".join(f"--deselect={name}\n" for name in passed), encoding="utf-8")
    return file


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _report(state: dict[str, dict], arguments: argparse.Namespace) -> int:
    """A line a step, and what to do next."""
    for step in STEPS:
        if step.name in state:
            one = state[step.name]
            print(f"{step.name:<14} {one['status']:<8} exit {one['exit_code']}  {one['seconds']:.0f} s")
    left = [step.name for step in STEPS if state.get(step.name, {}).get("status") != "done"]
    left = [name for name in left if not arguments.only or name in arguments.only]
    spent = sum(step["seconds"] for step in state.values())
    if left:
        print(
            f"left: {', '.join(left)}; {max(0.0, arguments.budget - spent):.0f} s of the budget; the same command goes on"
        )
    failed = [
        name for name, one in state.items() if one["status"] != "cut off" and one["exit_code"] not in (None, 0, 5)
    ]
    return ExitCode.FAILED if failed else ExitCode.OK
