"""Which torch, CUDA, Triton and xFormers an interpreter has, asked in a process of its own: a torch that crashes or
hangs on import is an answer too.

This file is also the program that runs in that process, and so imports the standard library only. Imports neither torch
nor pytest on the asking side.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class StackFacts:
    """What an interpreter has; None is what it has not, or what could not be found out.

    `torch_error`, `triton_error` and `xformers_error` say why an installed package does not import, `cuda_warning` what
    torch said when it looked for a GPU. `device`, `uuid`, `capability` and `arch_list` are there only with a GPU.
    `error` says why the interpreter gave no full answer.
    """

    python: str | None = None
    torch: str | None = None
    torch_imported: bool = False
    torch_error: str | None = None
    cuda: str | None = None
    hip: str | None = None
    cudnn: int | None = None
    cuda_warning: str | None = None
    device: str | None = None
    uuid: str | None = None
    capability: tuple[int, int] | None = None
    arch_list: tuple[str, ...] = ()
    triton: str | None = None
    triton_error: str | None = None
    xformers: str | None = None
    xformers_requires: tuple[str, ...] = ()
    xformers_error: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class CompileTrial:
    """One small function through torch.compile, cold: the seconds it took, or why it did not work."""

    seconds: float | None = None
    error: str | None = None


def stack_facts(python: str = sys.executable, index: int = 0, timeout_seconds: float = 120) -> StackFacts:
    """The stack of the interpreter `python`, seen from CUDA device `index`. Raises nothing: see `error`."""
    answers, error = _ask(python, ["facts", str(index)], timeout_seconds)
    known = {field.name for field in fields(StackFacts)}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in answers.items() if key in known}
    return StackFacts(**{**values, "error": error})


def compile_trial(python: str = sys.executable, index: int | None = None, timeout_seconds: float = 300) -> CompileTrial:
    """torch.compile of a small function on CUDA device `index`, or on the CPU. Its caches are thrown away after it."""
    answers, error = _ask(python, ["compile", "cpu" if index is None else f"cuda:{index}"], timeout_seconds)
    return CompileTrial(answers.get("seconds"), answers.get("compile_error") or error)


def runs_on(capability: tuple[int, int], arch_list: tuple[str, ...]) -> bool:
    """Whether a build for `arch_list` (torch.cuda.get_arch_list) has code for a GPU of this compute capability.

    Binary code (`sm_80`) runs on later minor versions of the same major, PTX (`compute_80`) on everything later; an `f`
    behind the number keeps PTX to its major, an `a` keeps either to exactly its own version.
    Source: NVIDIA, CUDA C++ Programming Guide, compute capabilities.
    """
    for arch in arch_list:
        kind, _, number = arch.partition("_")
        digits = number.rstrip("af")
        if kind not in ("sm", "compute") or not digits.isdigit():
            continue
        built_for = (int(digits[:-1] or 0), int(digits[-1]))
        same_major = built_for[0] == capability[0]
        if built_for == capability or (
            built_for < capability
            and not number.endswith("a")
            and (same_major or (kind, number) == ("compute", digits))
        ):
            return True
    return False


def _ask(python: str, arguments: list[str], timeout_seconds: float) -> tuple[dict, str | None]:
    """What this file, run by `python`, answers, and what kept it from finishing."""
    command = [shutil.which(python) or python, "-c", Path(__file__).read_text(), *arguments]
    with tempfile.TemporaryDirectory(prefix="sd-perf-", ignore_cleanup_errors=True) as scratch:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor", "TRITON_CACHE_DIR": f"{scratch}/triton"}
        try:
            process = subprocess.Popen(
                [os.path.abspath(command[0]), *command[1:]],
                cwd=scratch,  # `-c` looks for modules here first, and perf/ has one called statistics
                env={**os.environ, **caches},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # inductor has children, which must end with it
            )
        except OSError as refusal:
            return {}, f"{python} cannot be run ({refusal.strerror})"
        try:
            out, err = process.communicate(timeout=timeout_seconds)
            error = _ending(process.returncode, err)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            error = f"no answer within {timeout_seconds:g} s"
    answers: dict = {}
    for line in out.splitlines():
        try:
            answer = json.loads(line)
        except ValueError:
            continue  # something that an import printed
        answers.update(answer if isinstance(answer, dict) else {})
    return answers, error


def _ending(returncode: int, err: str) -> str | None:
    if returncode == 0:
        return None
    if returncode < 0:
        return f"it died of signal {-returncode} ({signal.strsignal(-returncode)})"
    return _one_line(err.strip().splitlines()[-1]) if err.strip() else f"it ended with code {returncode}"


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:200]


# From here on: what runs in the interpreter that is asked.


def _answer(**values) -> None:
    print("\n" + json.dumps(values), flush=True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a damaged package raises anything
        return f"{type(error).__name__}: {_one_line(error)}"
    return None


def _answer_facts(index: int) -> None:
    packages = {package: _version(package) for package in ("torch", "triton", "xformers")}
    requires = (metadata.requires("xformers") or []) if packages["xformers"] else []
    _answer(python=platform.python_version(), xformers_requires=requires, **packages)
    if importlib.util.find_spec("torch"):  # answered apart from the rest, because this may be the last that is heard
        _answer(torch_error=_import_error("torch"))
    if "torch" not in sys.modules:
        return
    _answer_torch(sys.modules["torch"], index)
    if packages["triton"]:
        _answer(triton_error=_import_error("triton"))
    if packages["xformers"]:
        _answer(xformers_error=_import_error("xformers.ops"))


def _answer_torch(torch, index: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    _answer(
        torch_imported=True,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        hip=getattr(torch.version, "hip", None),
        cudnn=torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        cuda_warning=_one_line(caught[0].message) if caught and not available else None,
    )
    if available and index < torch.cuda.device_count():
        properties = torch.cuda.get_device_properties(index)
        uuid = getattr(properties, "uuid", None)  # since torch 2.4 or so
        _answer(
            device=properties.name,
            uuid=None if uuid is None else str(uuid),
            capability=[properties.major, properties.minor],
            arch_list=torch.cuda.get_arch_list(),
        )


def _answer_compile(device: str) -> None:
    import torch

    if not hasattr(torch, "compile"):
        _answer(compile_error=f"torch {torch.__version__} has no torch.compile")
        return
    from torch._dynamo.utils import counters

    def function(x):
        return torch.sin(x) * 2 + torch.cos(x)

    x = torch.linspace(0, 1, 1000, device=device)
    begin = time.perf_counter()
    try:
        result = torch.compile(function)(x)
    except Exception as error:  # inductor raises whatever a compiler, a linker or Triton did
        _answer(compile_error=f"{type(error).__name__}: {_one_line(error)}")
        return
    seconds = time.perf_counter() - begin
    if not counters["stats"]["unique_graphs"]:
        _answer(compile_error="torch.compile left the function as it was")
    elif not torch.allclose(result, function(x), atol=1e-5):
        _answer(compile_error="the compiled function gives other numbers")
    else:
        _answer(seconds=seconds)


if __name__ == "__main__":
    if sys.argv[1] == "facts":
        _answer_facts(int(sys.argv[2]))
    else:
        _answer_compile(sys.argv[2])
