"""The command line of the suite: what to measure and how. Adds to pytest's own options and reads them back."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from perf.configurations.configuration import CHOICES, UnknownChoice
from perf.launch.process import Interpreter
from perf.machine.nvml import NoTelemetry
from perf.session.settings import CLOCKS, Settings

# option, field, and how one value of it is read
MATRIX = (
    ("--model", "model", "model preset; without --ckpt the full-size ones have random weights"),
    ("--attention", "attention", "attention implementation"),
    ("--sdpa-kernels", "sdpa_kernels", "SDPA kernels allowed in mha and sdpa, several with commas: math,flash"),
    ("--compile", "compile", "mode of torch.compile"),
    ("--compile-scope", "compile_scope", "what is compiled as one graph"),
    ("--precision", "precision", "precision"),
    (
        "--optimise",
        "optimise",
        "a preset (fast, original, none) or techniques with commas between, as txt2img takes them",
    ),
    ("--batch", "batch", "images per round"),
    ("--steps", "steps", "sampler steps"),
    ("--sampler", "sampler", "sampler"),
    ("--size", "size", "pixels, 512 or HEIGHTxWIDTH"),
    ("--ckpt", "checkpoint", "weights: .ckpt, .safetensors or a diffusers folder"),
    ("--config", "config", "YAML file in the original layout that describes the weights"),
    ("--device", "device", "cpu or cuda"),
)


def add_options(parser) -> None:
    """The options of `pytest perf`."""
    matrix = parser.getgroup("perf-matrix", "what to measure; each may be given several times, and all are crossed")
    for option, field, words in MATRIX:
        known = f" ({', '.join(CHOICES[field])})" if field in CHOICES and field != "device" else ""
        matrix.addoption(option, dest=f"perf_{field}", action="append", metavar=field.upper(), help=words + known)
    add = parser.getgroup("perf", "how to measure").addoption
    add("--perf-launches", type=int, metavar="L", help="fresh processes per configuration (GPU, pairs: 10, CPU: 6)")
    add(
        "--perf-rounds",
        type=int,
        metavar="R",
        help="timed rounds per launch, after a warm-up round (GPU: 2, CPU: 3, pairs on it: 8)",
    )
    add("--perf-inprocess", action="store_true", help="everything in this process: quick, without launch variance")
    add("--perf-clock", choices=("auto", *CLOCKS), default="auto", help="wall or CPU time (auto: CPU time on a CPU)")
    add("--perf-threads", type=int, metavar="N", help="CPU threads of torch (CPU time: 1, wall time: torch's own)")
    add("--perf-python", action="append", default=[], metavar="LABEL=PATH", help="measure with this Python too")
    add("--perf-against", metavar="REF", help="measure the sd/ of another commit in the same interleave")
    add("--perf-aa", action="store_true", help="measure each configuration against itself, and save the noise")
    add(
        "--perf-compile-cache",
        type=Path,
        metavar="DIR",
        help="keep torch.compile's cache here, one for all configurations: first calls are then warm",
    )
    add("--perf-resume", action="store_true", help="go on with the last session where it was cut off")
    add(
        "--perf-strict",
        action="store_true",
        help="exit 21 when a comparison is inconclusive; refuse to run without a baseline",
    )
    add("--perf-foreign", action="store_true", help="compare with another machine's run; verdicts are then not given")
    add("--perf-report", metavar="DIR", help="write plots, tables and one page of this run and the stored ones")
    add("--perf-trace", metavar="DIR", help="trace one more round of each configuration with torch's profiler")
    add(
        "--perf-inject-slowdown",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="slow the working tree: tests the gate",
    )


def given(config) -> dict[str, list]:
    """The fields that options name, each with its values. Raises pytest.UsageError."""
    values: dict[str, list] = {}
    for option, field, _ in MATRIX:
        texts = config.getoption(f"perf_{field}", None)
        if not texts:
            continue
        try:
            read = [_value(field, text) for text in texts]
        except (ValueError, UnknownChoice) as error:
            raise pytest.UsageError(f"{option}: {error}") from None
        values[field] = read
    if "config" in values and "checkpoint" not in values:
        raise pytest.UsageError("--config describes the weights of --ckpt: give both")
    if "checkpoint" in values and "model" not in values:
        raise pytest.UsageError(
            f"--ckpt needs --model beside it: which of {', '.join(CHOICES['model'])} the weights are"
        )
    if len(set(values.get("device", ()))) == 1:  # then it is the session's, and no difference between configurations
        del values["device"]
    return values


def _value(field: str, text: str):
    if field == "sdpa_kernels":
        kernels = tuple(part.strip() for part in text.split(","))
        for kernel in kernels:
            if kernel not in CHOICES[field]:
                raise ValueError(f"{kernel!r}: choose from {', '.join(CHOICES[field])}")
        return kernels
    if field in ("batch", "steps"):
        if not text.isdigit() or int(text) < 1:
            raise ValueError(f"{text!r} is not a whole number of at least 1")
        return int(text)
    if field == "size":
        found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
        if not found or not all(map(int, filter(None, found.groups()))):
            raise ValueError(f"{text!r}: give pixels such as 512, or HEIGHTxWIDTH such as 512x768")
        return int(found[1]), int(found[2] or found[1])
    if field in ("checkpoint", "config"):
        if not Path(text).exists():
            raise ValueError(f"{text}: there is no such file")
        return str(Path(text).resolve())
    if field in CHOICES and text not in CHOICES[field]:
        raise ValueError(f"{text!r}: choose from {', '.join(CHOICES[field])}")
    return text


def machine_device(config, gpu) -> str:
    """The device of this session: the one named, else a GPU if there is one."""
    named = config.getoption("perf_device", None)
    if named and len(set(named)) == 1:
        return named[0]
    return "cpu" if isinstance(gpu, NoTelemetry) else "cuda"


def disabled(config) -> bool:
    """Whether every benchmark is to be called once and not measured."""
    return config.option.benchmark_disable and not config.option.benchmark_enable


def settings(config, device: str, folder: Path, margin: float) -> Settings:
    """How this session measures. Raises pytest.UsageError."""
    option = config.getoption
    clock = option("perf_clock")
    if clock == "auto":
        clock = "wall" if device == "cuda" else "cpu"
    threads = option("perf_threads")
    if threads is None and clock == "cpu":
        threads = 1  # with more, CPU time is the sum over threads that wait for each other
    launches, rounds = option("perf_launches"), option("perf_rounds")
    for name, value in (("--perf-launches", launches), ("--perf-rounds", rounds), ("--perf-threads", threads)):
        if value is not None and value < 1:
            raise pytest.UsageError(f"{name} {value}: must be at least 1")
    isolated = not (option("perf_inprocess") or disabled(config))
    if option("perf_aa") and option("perf_against"):
        raise pytest.UsageError("--perf-aa and --perf-against both give every configuration a second label: choose one")
    if not 0 <= option("perf_inject_slowdown") <= 1:
        raise pytest.UsageError("--perf-inject-slowdown: a fraction between 0 and 1")
    interpreters = dict(_interpreter(text) for text in option("perf_python"))
    if len(interpreters) < len(option("perf_python")):
        raise pytest.UsageError("--perf-python: one label stands for two interpreters")
    if not isolated and (interpreters or option("perf_against")):
        raise pytest.UsageError(
            "--perf-inprocess has one interpreter and one sd: leave out --perf-python and --perf-against"
        )
    if disabled(config):
        launches = rounds = 1
    elif not isolated:
        launches = launches or 1
    paired = option("perf_aa") or option("perf_against")
    # Of pairs side by side on a CPU, where rounds are what is noisy: as `python -m perf battery` measured that it works.
    usual_rounds = 5 if not isolated else 2 if device == "cuda" else 8 if paired else 3
    return Settings(
        device=device,
        folder=folder,
        clock=clock,
        threads=threads,
        launches=launches or (10 if device == "cuda" or paired else 6),
        rounds=rounds or usual_rounds,
        isolated=isolated,
        resume=option("perf_resume"),
        interpreters=interpreters,
        aa=option("perf_aa"),
        slowdown=option("perf_inject_slowdown"),
        compile_cache=option("perf_compile_cache"),
        margin=margin,
        trace=Path(option("perf_trace")) if option("perf_trace") else None,
    )


def _interpreter(text: str) -> tuple[str, Interpreter]:
    label, separator, path = text.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z0-9._]+", label):
        raise pytest.UsageError(f"--perf-python {text!r}: give LABEL=PATH, such as torch112=.tox/torch112/bin/python")
    # Not resolved: a virtual environment's python is a link, and what it links to is another environment.
    python = os.path.abspath(path)
    if shutil.which(python) is None:
        raise pytest.UsageError(f"--perf-python {text!r}: {python} is no program")
    return label, Interpreter(python)


def other_commit(reference: str, root: Path) -> tuple[str, Interpreter, tempfile.TemporaryDirectory]:
    """(its short hash, an interpreter with its `sd`, the folder to keep) of a commit of this repository."""

    def git(*arguments: str) -> bytes:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=True)
        except FileNotFoundError:
            raise pytest.UsageError("--perf-against needs git, which is not installed") from None
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode("utf-8", "replace").strip().splitlines()
            raise pytest.UsageError(
                f"--perf-against {reference}: {said[-1] if said else 'there is no such commit'}"
            ) from None
        return done.stdout

    # --quiet: what is no commit is then a status, without git's words about revisions
    commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{reference}^{{commit}}").decode().strip()
    folder = tempfile.TemporaryDirectory(prefix="sd-perf-base-")
    archive = git("archive", "--format=tar", commit, "sd")
    subprocess.run(["tar", "-x", "-C", folder.name], input=archive, check=True)
    return commit[:12], Interpreter(sys.executable, Path(folder.name)), folder
