"""Options of `pytest perf`: definition, validation and conversion to session settings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentTypeError
from dataclasses import replace
from pathlib import Path

import pytest

from perf.configurations.configuration import CHOICES, ENGINES, is_own
from perf.configurations.project import Project, ProjectError, find_root, read_project
from perf.launch.process import Interpreter
from perf.machine.nvml import NoTelemetry
from perf.session.loading import DESCRIPTIONS
from perf.session.pairs import looks_of, rounds_of
from perf.session.settings import CLOCKS, Settings


def _text(text: str) -> str:
    if not text.strip():  # would silently select the defaults or compare nothing
        raise ArgumentTypeError("the value is empty; is a variable unset?")
    return text


def _member(field: str, text: str) -> str:
    if text not in CHOICES[field]:
        raise ArgumentTypeError(f"{text!r}: choose from {', '.join(CHOICES[field])}")
    return text


def _choice(field: str):
    return lambda text: _member(field, _text(text))


def _engine(text: str) -> str:
    """An engine; the path of a file is relative to the working directory if the file is below it."""
    if _text(text) in ENGINES:
        return text
    path, colon, name = text.partition(":")
    if text.isidentifier():  # of the configuration file, which is read later
        return text
    if not is_own(text):
        known = ", ".join(ENGINES)
        raise ArgumentTypeError(f"{text!r}: choose from {known}, or name your own as FILE.py:NAME or MODULE:NAME")
    if not path.endswith(".py"):
        return text
    if not Path(path).is_file():
        raise ArgumentTypeError(f"{path}: there is no such file")
    below = Path(path).resolve().is_relative_to(Path.cwd())
    return Path(os.path.relpath(path) if below else path).as_posix() + colon + name


def _kernels(text: str) -> tuple[str, ...]:
    return tuple(_member("sdpa_kernels", part.strip()) for part in _text(text).split(","))


def _count(text: str) -> int:
    if not _text(text).isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _rank(text: str) -> int:
    if not _text(text).isdigit():
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _fraction(text: str) -> float:
    if not 0 <= float(_text(text)) <= 1:
        raise ArgumentTypeError("a fraction between 0 and 1")
    return float(text)


def _scale(text: str) -> float:
    if not 0 <= float(_text(text)) < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return float(text)


def _session_name(text: str) -> str:
    if not re.fullmatch(r"\d[\d-]*(\.jsonl)?", _text(text)):  # such as the path of the tests after the option
        raise ArgumentTypeError(f"{text!r} is no name of a session; write --perf-resume=NAME, or put {text} before it")
    return text


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", _text(text))
    if not match or not all(map(int, filter(None, match.groups()))):
        raise ArgumentTypeError(f"{text!r}: give pixels such as 512, or HEIGHTxWIDTH such as 512x768")
    return int(match[1]), int(match[2] or match[1])


# (option, field of a configuration, conversion of a value, help)
MATRIX = (
    ("--model", "model", _choice("model"), "model preset; without --ckpt the full-size ones have random weights"),
    ("--engine", "engine", _engine, "sd, diffusers, or your own: FILE.py:NAME or MODULE:NAME"),
    ("--attention", "attention", _choice("attention"), "attention implementation"),
    ("--sdpa-kernels", "sdpa_kernels", _kernels, "SDPA kernels of mha and sdpa, several with commas: math,flash"),
    ("--compile", "compile", _choice("compile"), "mode of torch.compile"),
    ("--compile-scope", "compile_scope", _choice("compile_scope"), "the part that is compiled as one graph"),
    ("--compile-backend", "compile_backend", _choice("compile_backend"), "the compiler or runtime behind --compile"),
    ("--precision", "precision", _choice("precision"), "precision"),
    ("--optimise", "optimise", _text, "a preset (fast, original, none) or techniques, comma-separated, as in txt2img"),
    ("--lora-rank", "lora_rank", _rank, "rank of a LoRA with random factors merged into the weights, 0 for none"),
    ("--batch", "batch", _count, "images per round"),
    ("--steps", "steps", _count, "sampler steps"),
    ("--sampler", "sampler", _choice("sampler"), "sampler"),
    ("--timestep-spacing", "timestep_spacing", _choice("timestep_spacing"), "timesteps that the sampler visits"),
    ("--sigmas", "sigmas", _choice("sigmas"), "noise levels of the sampler"),
    ("--scale", "scale", _scale, "guidance scale; 1 runs the UNet without guidance, with half the batch"),
    ("--size", "size", _size, "pixels, 512 or HEIGHTxWIDTH"),
    ("--ckpt", "checkpoint", _text, "weights: .ckpt, .safetensors or a diffusers folder"),
    ("--config", "config", _text, "YAML file in the original layout that describes the weights"),
    ("--device", "device", _choice("device"), "cpu or cuda"),
)


PAIRED = ("perf_against", "perf_aa", "perf_a")  # options that compare within a session


def add_short_options(parser) -> None:
    """Define the matrix options under their short names, such as `--model`, which other plugins and suites may have too."""
    for option, field, read, help in MATRIX:
        _matrix_group(parser).addoption(option, action="append", type=read, **_described(field, help))


def _matrix_group(parser):
    return parser.getgroup("perf-matrix", "what to measure; each may be given several times, and all are crossed")


def _described(field: str, help: str) -> dict[str, str]:
    choices = f" ({', '.join(CHOICES[field])})" if field in CHOICES and field not in ("device", "engine") else ""
    return {"dest": f"perf_{field}", "metavar": field.upper(), "help": help + choices}


def any_given(config) -> bool:
    """Whether an option of this plugin has another value than its default."""
    names = [name for name in vars(config.option) if name.startswith("perf_")]
    return any(getattr(config.option, name) not in (None, False, [], 0.0, "auto") for name in names)


def add_options(parser) -> None:
    """Define the options of `pytest perf`, all of whose names begin with `--perf-`."""
    for option, field, read, _ in MATRIX:
        help = f"as {option}, which only `pytest perf` and `-p perf.plugin` know"
        settings = {"dest": f"perf_{field}", "metavar": field.upper(), "help": help}
        _matrix_group(parser).addoption(f"--perf-{option[2:]}", action="append", type=read, **settings)
    add = parser.getgroup("perf", "how to measure").addoption
    help = "fresh processes per configuration (CPU: 4, GPU: 10, pairs: 8, and up to 24 while they are undecided)"
    add("--perf-launches", type=_count, metavar="L", help=help)
    help = (
        "timed rounds per launch, after a warm-up round (GPU: 2, CPU: 4, pairs on a CPU: 8, and up to 24 where noisy)"
    )
    add("--perf-rounds", type=_count, metavar="R", help=help)
    help = "what is loaded together, so that its rounds alternate (default: as much as an estimate of memory allows)"
    add("--perf-loading", choices=tuple(DESCRIPTIONS), help=help)
    add("--perf-inprocess", action="store_true", help="everything in this process: quick, without launch variance")
    add("--perf-clock", choices=("auto", *CLOCKS), default="auto", help="wall or CPU time (auto: CPU time on a CPU)")
    add(
        "--perf-threads",
        type=_count,
        metavar="N",
        help="CPU threads of torch (CPU time: 1, wall time on a CPU: OMP_NUM_THREADS, or the physical cores within a quota)",
    )
    help = "also measure with this Python"
    add("--perf-python", action="append", type=_text, default=[], metavar="LABEL=PATH", help=help)
    add("--perf-against", type=_text, metavar="REF", help="measure the sd/ of another commit in the same interleave")
    help = "compare two configurations in one session: the options of the first, such as '--attention sdpa'"
    add("--perf-a", type=_text, metavar="OPTIONS", help=help)
    add("--perf-b", type=_text, metavar="OPTIONS", help="the options of the second, such as '--attention mha'")
    add("--perf-aa", action="store_true", help="measure each configuration against itself, and save the noise")
    help = "persistent cache of torch.compile, shared by all configurations: first calls are then warm"
    add("--perf-compile-cache", type=_text, metavar="DIR", help=help)
    help = "resume the unfinished session with these options, or the one of this name"
    add("--perf-resume", nargs="?", const=True, default=False, type=_session_name, metavar="NAME", help=help)
    help = "exit 21 if a comparison is inconclusive; refuse to run without a baseline"
    add("--perf-strict", action="store_true", help=help)
    help = "fail a configuration whose operators, bytes, kernels, graph breaks, recompiles or host waits changed"
    add("--perf-fail-on-counts", action="store_true", help=help)
    add("--perf-foreign", action="store_true", help="compare with another machine's run, without verdicts")
    help = "write plots, tables and one page of this run and the stored ones"
    add("--perf-report", type=_text, metavar="DIR", help=help)
    help = "trace one more round of each configuration with torch's profiler"
    add("--perf-trace", type=_text, metavar="DIR", help=help)
    help = "slow the working tree down, to test the regression gate"
    add("--perf-inject-slowdown", type=_fraction, default=0.0, metavar="FRACTION", help=help)


def matrix_values(config) -> dict[str, list]:
    """The configuration fields that options set, each with its values. Raises pytest.UsageError."""
    options = {field: config.getoption(f"perf_{field}", None) for _, field, *_ in MATRIX}
    values = require_weights({field: list(given) for field, given in options.items() if given}, project(config))
    if len(set(values.get("device", ()))) == 1:  # a single device belongs to the session, not to the configurations
        del values["device"]
    return values


def _named(engine: str, project: Project) -> str:
    """The engine that a name stands for. Raises pytest.UsageError."""
    if engine in ENGINES or is_own(engine):
        return engine
    if engine not in project.engines:
        known = ", ".join((*ENGINES, *project.engines))
        raise pytest.UsageError(
            f"--engine: {engine!r}: choose from {known}, or name your own as FILE.py:NAME or MODULE:NAME"
        )
    return project.engines[engine]


def project(config) -> Project:
    """The configuration file of the rootdir or its nearest parent that has one. Raises pytest.UsageError."""
    try:
        return read_project(find_root(config.rootpath))
    except ProjectError as error:
        raise pytest.UsageError(str(error)) from None


def require_weights(values: dict[str, list], project: Project) -> dict[str, list]:
    """The values with absolute paths of weights and the engines that names of the configuration file stand for.

    Raises pytest.UsageError for absent files, unknown names and missing options.
    """
    values = {
        **values,
        **({"engine": [_named(each, project) for each in values["engine"]]} if "engine" in values else {}),
    }
    for option, field in (("--ckpt", "checkpoint"), ("--config", "config")):
        for path in values.get(field, ()):
            if not Path(path).exists():
                raise pytest.UsageError(f"{option}: {path}: there is no such file")
        values |= {field: [str(Path(path).resolve()) for path in values[field]]} if field in values else {}
    if "config" in values and "checkpoint" not in values:
        raise pytest.UsageError("--config describes the weights of --ckpt: give both")
    own = [engine for engine in values.get("engine", ()) if is_own(engine)]
    if own and "model" in values and len(own) == len(values["engine"]):
        raise pytest.UsageError(f"--model: {own[0]} is an engine of your own, which chooses its model itself")
    if set(values.get("compile_backend", ())) - {"inductor"} and "compile" not in values:
        if "optimise" in values:
            raise pytest.UsageError(
                "--compile-backend: --optimise compiles by its own choice; give --compile instead of it"
            )
        values["compile"] = ["default"]
    if "checkpoint" in values and "model" not in values and not own:
        models = ", ".join(CHOICES["model"])
        raise pytest.UsageError(f"--ckpt needs --model beside it: which of {models} the weights are")
    return values


def machine_device(config, gpu) -> str:
    """The device of this session: that of --device, else a GPU if there is one."""
    devices = set(config.getoption("perf_device", None) or ())
    if len(devices) == 1:
        return devices.pop()
    return "cpu" if isinstance(gpu, NoTelemetry) else "cuda"


def disabled(config) -> bool:
    """Whether benchmarks are called once without timing (--benchmark-disable)."""
    return config.option.benchmark_disable and not config.option.benchmark_enable


def settings(config, device: str, folder: Path, margin: float) -> Settings:
    """Convert the options to session settings. Raises pytest.UsageError."""
    option = config.getoption
    isolated = not (option("perf_inprocess") or disabled(config))
    interpreters = dict(map(interpreter, option("perf_python")))
    _validate(option, isolated, interpreters)
    clock = option("perf_clock")
    if clock == "auto":
        clock = "wall" if device == "cuda" else "cpu"
    threads = option("perf_threads")
    if threads is None and clock == "cpu":
        threads = 1  # CPU time of several threads includes the time that they wait for each other
    elif threads is None and (device == "cpu" or "cpu" in (option("perf_device", None) or ())):
        from sd.cpus import default_threads  # not above: a worker imports this module beside the `sd` of another commit

        threads = default_threads(os.environ)[0]
    paired = any(map(option, PAIRED))
    looks = looks_of(option("perf_launches"), paired and isolated)
    launches = looks[0] if looks else 10 if device == "cuda" else 4
    launches = option("perf_launches") or (launches if isolated else 1)
    rounds = option("perf_rounds") or (None if isolated else 5)
    if disabled(config):
        launches = rounds = 1
    rounds, most_rounds = rounds_of(rounds, device, paired)
    cache, trace = option("perf_compile_cache"), option("perf_trace")
    return Settings(
        device=device,
        folder=folder,
        clock=clock,
        threads=threads,
        launches=launches,
        looks=looks,
        loading=option("perf_loading"),
        rounds=rounds,
        most_rounds=most_rounds,
        isolated=isolated,
        resume=option("perf_resume"),
        interpreters=interpreters,
        aa=option("perf_aa"),
        slowdown=option("perf_inject_slowdown"),
        compile_cache=Path(cache) if cache else None,
        margin=margin,
        trace=Path(trace) if trace else None,
        counting=not disabled(config),
        rootpath=config.rootpath,
        pytest_arguments=tuple(
            str(argument) for argument in config.invocation_params.args if str(argument) not in config.args
        ),
    )


def require_for_own_suite(config) -> None:
    """Raise pytest.UsageError for options that have no effect on tests of `measured`."""
    option = config.getoption
    for name in ("perf_a", "perf_b", "perf_python"):
        if option(name):
            raise pytest.UsageError(
                f"--{name.replace('_', '-')} is for configurations, and the tests of `measured` have none: leave it out"
            )
    compares = [name for name in (*PAIRED, "perf_strict", "perf_fail_on_counts") if option(name)]
    if option("perf_inprocess") and compares:
        raise pytest.UsageError(
            f"--{compares[0].replace('_', '-')}: with --perf-inprocess pytest-benchmark alone times the tests of "
            "`measured`, and nothing is compared: leave out one of the two"
        )


def _validate(option, isolated: bool, interpreters: dict[str, Interpreter]) -> None:
    given = [f"--{name.replace('_', '-')}" for name in PAIRED if option(name)]
    if len(given) > 1:
        raise pytest.UsageError(f"{' and '.join(given[::-1])} both give every configuration a second label: choose one")
    if len(interpreters) < len(option("perf_python")):
        raise pytest.UsageError("--perf-python: one label stands for two interpreters")
    if not isolated and (interpreters or option("perf_against")):
        raise pytest.UsageError(
            "--perf-inprocess has one interpreter and one sd: leave out --perf-python and --perf-against"
        )


def interpreter(text: str) -> tuple[str, Interpreter]:
    label, separator, path = text.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z0-9._]+", label):
        raise pytest.UsageError(f"--perf-python {text!r}: give LABEL=PATH, such as torch112=.tox/torch112/bin/python")
    python = os.path.abspath(path)  # not resolved: a virtual environment's python is a link to the base environment's
    if shutil.which(python) is None:
        raise pytest.UsageError(f"--perf-python {text!r}: {python} is no program")
    return label, Interpreter(python)


def other_commit(reference: str, root: Path) -> tuple[str, Interpreter, tempfile.TemporaryDirectory]:
    """Extract the `sd/` of a commit: (its short hash, an interpreter that imports it, the temporary folder).

    The repository of a user's own engines need not have an `sd/`.
    """
    # With --quiet git prints nothing for an unknown revision and only sets its exit status.
    revision = ("rev-parse", "--verify", "--quiet", "--end-of-options", f"{reference}^{{commit}}")
    commit = _git(reference, root, *revision).decode().strip()
    folder = tempfile.TemporaryDirectory(prefix="sd-perf-base-")
    if _git(reference, root, "ls-tree", "-d", commit, "sd"):
        _extract(_git(reference, root, "archive", "--format=tar", commit, "sd"), Path(folder.name))
    return commit[:12], Interpreter(sys.executable, Path(folder.name)), folder


def complete(against: tuple[str, Interpreter], root: Path, own: bool, ours: bool) -> tuple[str, Interpreter]:
    """The other commit with what the configurations need: all its files for the user's own, `sd/` for ours.

    Raises pytest.UsageError for a commit without `sd/`: both sides would import that of this tree.
    """
    commit, interpreter = against
    if ours and not (interpreter.source / "sd").is_dir():
        raise pytest.UsageError(
            f"--perf-against {commit}: that commit has no sd/, the model that these configurations measure"
        )
    if not own:
        return against
    top = Path(_git(commit, root, "rev-parse", "--show-toplevel").decode().rstrip("\n"))
    tree = interpreter.source / "tree"
    tree.mkdir(exist_ok=True)
    _extract(_git(commit, top, "archive", "--format=tar", commit), tree)
    return commit, replace(interpreter, tree=(top, tree))


def _extract(archive: bytes, folder: Path) -> None:
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)


def _git(reference: str, folder: Path, *arguments: str) -> bytes:
    """The output of git. Raises pytest.UsageError about --perf-against."""
    try:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise pytest.UsageError("--perf-against needs git, which is not installed") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = lines[-1] if lines else "there is no such commit"
        raise pytest.UsageError(f"--perf-against {reference}: {reason}") from None
