"""Measure a borrowed GPU in parts of at most 9 minutes, each complete in itself.

    python3 .github/scripts/gpu_session.py 1 --out DIR          part 1 of 6: DIR/part1.json, part1.tar.gz, part1-traces.tar.gz
    python3 .github/scripts/gpu_session.py rehearse --out DIR   all parts with the embedded model on a CPU and a fake NVML

Each part may run on another machine, which has no network and nothing of an earlier part on its disk, and from which only
small files can be copied. So no part needs a file of another, and `--wheels DIR` installs missing packages from a folder. The
compile cache stays on the machine, for a further part there. `.github/gpu-session.json` has the predicted seconds of every
step, beside which the real ones are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workflow import ROOT, Refusal, main, read_json

PREDICTIONS = ROOT / ".github" / "gpu-session.json"
PART_SECONDS = 540.0
GRACE_SECONDS = 20.0  # for an interrupted pytest to save what it has
PACK_SECONDS = 15.0
COMPILE_CACHE = "gpu-session-compile-cache"  # in the folder for temporary files
MOST_BYTES = 16 << 20  # of a file that comes back
INCOMPLETE = 3  # exit status
SUCCESS = (0, 5)  # pytest's exit statuses of success, and of no selected test
# What pytest perf imports; a machine with torch may lack the rest.
REQUIRED = ("pytest", "pytest_benchmark", "omegaconf", "open_clip", "psutil", "rich", "yaml", "pynvml")
# And a part, whose tests would be skipped without them.
REQUIRED_BY = {"3": ("diffusers", "transformers")}


@dataclass(frozen=True)
class Step:
    """One pytest run of a part. arguments: of pytest; measures: whether it is `pytest perf`; limit: in seconds."""

    name: str
    arguments: tuple[str, ...]
    measures: bool = True
    limit: float = math.inf


def _perf(name: str, *arguments: str) -> Step:
    return Step(name, ("perf/test_txt2img.py", *arguments))


FAST_AND_ORIGINAL = ("--model", "sd2", "--optimise", "original", "--optimise", "fast")
FEW = ("--perf-launches", "2", "--perf-rounds", "4")
HALF = ("--model", "sd2", "--precision", "fp16", "--optimise", "channels_last,cudnn_benchmark")
# diffusers as most use it. Its documented recipe, max-autotune, is left out: ours had not compiled after 250 s.
PEERS = ("-m", "peers", "--model", "sd2", "-k", "fast or (diffusers and not xformers and not autotune)")
CORRECTNESS = ("tests", "-m", "gpu and not slow", "-k", "not compile and not test_fast", "-rpf")
TRACE = "{work}/traces"
PARTS = {
    "1": (
        # The test of `fast` compiles, and the parts that measure it check its images.
        Step("correctness", CORRECTNESS, measures=False, limit=120.0),
        # One process measures every technique that needs no compiler, so that the first results come within minutes.
        _perf("ladder", "-m", "gpu_ladder", "--perf-inprocess"),
    ),
    # Few launches, since the first one compiles for more than a minute.
    "2": (_perf("original-and-fast", *FAST_AND_ORIGINAL, "--batch", "1", *FEW),),
    "3": (_perf("peers", *PEERS, *FEW),),
    "4": (
        _perf("trace", *HALF, "--optimise", "fast", "--batch", "1", "--perf-inprocess", "--perf-trace", TRACE),
        _perf("batch-8", *FAST_AND_ORIGINAL, "--batch", "8", "--perf-launches", "1"),
    ),
    "5": (
        _perf("768", "--model", "sd2-v", "--optimise", "fast", "--batch", "1", "--perf-launches", "2"),
        _perf("sd1", "--model", "sd1", "--optimise", "fast", "--batch", "1", "--perf-launches", "2"),
    ),
    "6": (_perf("published", "-m", "published", "--perf-launches", "2"),),
}
# The embedded model on a CPU, in the place of a step's own.
REHEARSAL = {"--model": "tiny", "--steps": "4", "--device": "cpu", "--perf-launches": "2"}
ON_A_CPU = {"fp16": "full", "channels_last,cudnn_benchmark": "channels_last"}


@dataclass
class Outcome:
    """A step that ran. status: done, cut off at its limit or at the end of the part, or not started."""

    name: str
    predicted_seconds: float | None
    status: str = "not started"
    exit_code: int | None = None
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether it ended with a failure; a step that was cut off or not started is incomplete."""
        return self.status == "done" and self.exit_code not in SUCCESS


def command_of(step: Step, work: Path, rehearsal: bool) -> list[str]:
    """The pytest command of a step; all steps of a part share one storage, and so the reference images."""
    arguments = [argument.format(work=work) for argument in step.arguments]
    if step.measures:
        for option, value in REHEARSAL.items() if rehearsal else ():
            if option in arguments:
                arguments[arguments.index(option) + 1] = value
            elif option != "--perf-launches":
                arguments += [option, value]
        arguments = [ON_A_CPU.get(argument, argument) if rehearsal else argument for argument in arguments]
        arguments += [f"--benchmark-storage=file://{work / 'runs'}", f"--benchmark-save={step.name}"]
        arguments += [f"--perf-compile-cache={Path(tempfile.gettempdir(), COMPILE_CACHE)}"]
    elif importlib.util.find_spec("xdist") and not rehearsal:
        arguments += ["-n", "8"]  # most of a test is its start
    return [sys.executable, "-m", "pytest", *arguments, "-p", "no:cacheprovider"]


def run_step(command: Sequence[str], log: Path, limit: float) -> int | None:
    """pytest's exit status, or None where it was interrupted at the limit, in seconds."""
    with open(log, "wb") as output:
        # Under nohup, or behind an & in a script, SIGINT is ignored, and a child would inherit that.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, preexec_fn=_accept_interrupts
        )
        try:
            return process.wait(limit)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
            for _ in range(2):  # the first may arrive while a CUDA graph is recorded, which reports another error
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS / 2)
                    break
            else:
                process.kill()
                process.wait()
            if isinstance(stop, KeyboardInterrupt):
                raise
            return None


def _accept_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_part(part: str, out: Path, seconds: float, rehearsal: bool = False) -> list[Outcome]:
    """Run the steps of a part within its time, and pack what they wrote. Raises Refusal for missing packages."""
    begin = time.monotonic()
    predictions = _predictions("rehearsal" if rehearsal else "gpu", part)
    outcomes = [Outcome(step.name, predictions.get(step.name)) for step in PARTS[part]]
    with tempfile.TemporaryDirectory(prefix="gpu-session-") as folder:
        work = Path(folder)
        for name in ("runs", "traces", "logs"):
            (work / name).mkdir()
        machine = _machine()
        for step, outcome in zip(PARTS[part], outcomes):
            left = seconds - (time.monotonic() - begin) - GRACE_SECONDS - PACK_SECONDS
            if left <= 0:
                break
            left = min(left, step.limit)
            print(f"part {part}, {step.name}: at most {left:.0f} s", flush=True)
            started = time.monotonic()
            outcome.exit_code = run_step(command_of(step, work, rehearsal), work / "logs" / f"{step.name}.log", left)
            outcome.status = "cut off" if outcome.exit_code is None else "done"
            outcome.seconds = time.monotonic() - started
        kernels = _kernel_classes(work / "runs")
        content = {"part": part, "machine": machine, "seconds": time.monotonic() - begin, "kernel_classes": kernels}
        content["steps"] = [dataclasses.asdict(outcome) for outcome in outcomes]
        out.mkdir(parents=True, exist_ok=True)
        (out / f"part{part}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _pack(out / f"part{part}.tar.gz", work, ("runs", "logs"))
        _pack(out / f"part{part}-traces.tar.gz", work, ("traces",))
    _print(part, outcomes, kernels)
    return outcomes


def _predictions(kind: str, part: str) -> dict[str, float]:
    return read_json(PREDICTIONS)[kind].get(part, {})


def _machine() -> dict[str, object]:
    """The GPU as NVML reports it, or why there is none."""
    from perf.machine.nvml import NoTelemetry, open_visible_device

    device = open_visible_device()
    if isinstance(device, NoTelemetry):
        return {"no_gpu": device.reason}
    facts = device.facts()
    return {name: getattr(facts, name) for name in ("name", "uuid", "driver", "power_limit_watts", "sm_clock_max_mhz")}


def _kernel_classes(runs: Path) -> dict[str, dict[str, float]]:
    """Seconds of a traced round by class of kernel, for each configuration."""
    classes = {}
    for path in sorted(runs.rglob("[0-9]*_*.json")):
        for benchmark in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
            info = benchmark["extra_info"]
            if info.get("trace"):
                classes[info["configuration"]["id"]] = info["trace"]["seconds"]
    return classes


def _pack(path: Path, work: Path, names: Sequence[str]) -> None:
    """Pack folders; a file above the limit is removed with a message, since it could not come back."""
    with tarfile.open(path, "w:gz", compresslevel=6) as archive:
        for name in names:
            archive.add(work / name, name, filter=_without_references)
    if path.stat().st_size > MOST_BYTES:
        print(f"{path.name} has {path.stat().st_size >> 20} MiB, {MOST_BYTES >> 20} MiB allowed: it is left out")
        path.unlink()


def _without_references(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "references" in Path(member.name).parts else member  # a killed step has its rounds in its journal


def _print(part: str, outcomes: Sequence[Outcome], kernels: dict[str, dict[str, float]]) -> None:
    for outcome in outcomes:
        predicted = "unknown" if outcome.predicted_seconds is None else f"{outcome.predicted_seconds:.0f} s"
        print(
            f"part {part}  {outcome.name:<18} {outcome.status:<11} exit {outcome.exit_code}  "
            f"{outcome.seconds:.0f} s, predicted {predicted}"
        )
    for id, seconds in kernels.items():
        total = sum(seconds.values())
        largest = sorted(seconds.items(), key=lambda item: -item[1])[:6]
        shares = ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in largest)
        print(f"{id}: {1000 * total:.1f} ms: {shares}")


def install(wheels: Path, target: Path) -> None:
    """Install wheels into a folder that pytest and its workers import from. Raises Refusal."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise Refusal(f"{wheels} has no wheels")
    options = ["--no-index", "--no-deps", "--no-compile", "--quiet", "--upgrade", "--target", str(target)]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], check=False)
    if done.returncode:
        raise Refusal(f"the wheels of {wheels} cannot be installed")
    sys.path.insert(0, str(target))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")]))


def _require_packages(part: str) -> None:
    absent = [name for name in (*REQUIRED, *REQUIRED_BY.get(part, ())) if importlib.util.find_spec(name) is None]
    if absent:
        raise Refusal(
            f"this Python lacks {', '.join(absent)}: take their wheels along, and name the folder by --wheels"
        )


def rehearse(out: Path, seconds: float) -> list[Outcome]:
    """Run every part with the embedded model on a CPU; NVML is a fake with one GPU, which is not measured."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from fake_nvml import FakeNvml

    sys.modules["pynvml"] = FakeNvml()  # type: ignore[assignment]
    return [outcome for part in PARTS for outcome in run_part(part, out, seconds, rehearsal=True)]


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """1 if a step failed, else INCOMPLETE if one did not end in its time."""
    if any(outcome.failed for outcome in outcomes):
        return 1
    return 0 if all(outcome.status == "done" for outcome in outcomes) else INCOMPLETE


def run(argv: Sequence[str] | None = None) -> int:
    """Run a part or the rehearsal; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "rehearse"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first, without an index")
    parser.add_argument("--seconds", type=float, default=PART_SECONDS, help="of each part (default: 540)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="gpu-session-site-") as site:
        if arguments.wheels:
            install(arguments.wheels, Path(site))
        _require_packages(arguments.part)
        if arguments.part == "rehearse":
            outcomes = rehearse(arguments.out, arguments.seconds)
        else:
            outcomes = run_part(arguments.part, arguments.out, arguments.seconds)
    return exit_code(outcomes)


if __name__ == "__main__":
    raise SystemExit(main(run))
