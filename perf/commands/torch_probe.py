"""Versions of torch, CUDA, Triton and xFormers in any Python interpreter, read in a subprocess.

A torch that crashes or hangs on import is reported as an error. This file is also the program of the subprocess, whose
interpreter may have no `perf`: it imports the standard library only and has its own copies of small helpers.
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
    """The stack of an interpreter; None for an absent or unreadable value.

    torch_error, triton_error, xformers_error: the import error of an installed package. cuda_warning: torch's warning
    when it finds no GPU. device, uuid, capability, arch_list: set only with a GPU. error: the reason why the subprocess
    did not finish.
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
    """Result of torch.compile on one small function with a cold cache: seconds, or the error."""

    seconds: float | None = None
    error: str | None = None


def stack_facts(python: str = sys.executable, index: int = 0, timeout_seconds: float = 120) -> StackFacts:
    """Read the stack of the interpreter `python` and of CUDA device `index`; errors are fields of the result."""
    answers, error = _run_probe(python, ["facts", str(index)], timeout_seconds)
    names = {field.name for field in fields(StackFacts)}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in answers.items() if key in names}
    return StackFacts(**{**values, "error": error})


def compile_trial(python: str = sys.executable, index: int | None = None, timeout_seconds: float = 300) -> CompileTrial:
    """Compile a small function on CUDA device `index`, or on the CPU, with temporary caches."""
    answers, error = _run_probe(python, ["compile", "cpu" if index is None else f"cuda:{index}"], timeout_seconds)
    return CompileTrial(answers.get("seconds"), answers.get("compile_error") or error)


def runs_on(capability: tuple[int, int], arch_list: tuple[str, ...]) -> bool:
    """Whether a build for `arch_list` (torch.cuda.get_arch_list) has code for a GPU of this compute capability.

    Binary code (`sm_80`) runs on later minor versions of the same major, PTX (`compute_80`) on every later version; the
    suffix `f` restricts PTX to its major, `a` restricts either to exactly its own version.
    Source: NVIDIA, CUDA C++ Programming Guide, compute capabilities.
    """
    for arch in arch_list:
        code, _, number = arch.partition("_")
        digits = number.rstrip("af")
        if code not in ("sm", "compute") or not digits.isdigit():
            continue
        built_for = (int(digits[:-1] or 0), int(digits[-1]))
        same_major = built_for[0] == capability[0]
        if built_for == capability or (
            built_for < capability
            and not number.endswith("a")
            and (same_major or (code, number) == ("compute", digits))
        ):
            return True
    return False


def _run_probe(python: str, arguments: list[str], timeout_seconds: float) -> tuple[dict, str | None]:
    """Run this file with `python`; returns (its answers merged, the error that ended it early)."""
    command = [shutil.which(python) or python, "-c", Path(__file__).read_text(), *arguments]
    with tempfile.TemporaryDirectory(prefix="sd-perf-", ignore_cleanup_errors=True) as scratch:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor", "TRITON_CACHE_DIR": f"{scratch}/triton"}
        try:
            process = subprocess.Popen(
                [os.path.abspath(command[0]), *command[1:]],
                cwd=scratch,  # `-c` imports from the working directory first
                env={**os.environ, **caches},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # inductor's child processes are killed with it
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
        except BaseException:  # Ctrl-C does not reach a process group of its own
            os.killpg(process.pid, signal.SIGKILL)
            raise
    answers: dict = {}
    for line in out.splitlines():
        try:
            answer = json.loads(line)
        except ValueError:
            continue  # output of an import
        answers.update(answer if isinstance(answer, dict) else {})
    return answers, error


def _ending(returncode: int, err: str) -> str | None:
    if returncode == 0:
        return None
    if returncode < 0:
        return f"it was ended by signal {-returncode} ({signal.strsignal(-returncode)})"
    return _one_line(err.strip().splitlines()[-1]) if err.strip() else f"it ended with code {returncode}"


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:200]


# The program of the subprocess.


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
    if importlib.util.find_spec("torch"):  # a separate answer, because a crash may follow
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
        uuid = getattr(properties, "uuid", None)  # since torch 2.4
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
    except Exception as error:  # compilers, linkers and Triton raise anything
        _answer(compile_error=f"{type(error).__name__}: {_one_line(error)}")
        return
    seconds = time.perf_counter() - begin
    if not counters["stats"]["unique_graphs"]:
        _answer(compile_error="torch.compile did not compile the function")
    elif not torch.allclose(result, function(x), atol=1e-5):
        _answer(compile_error="the compiled function returns different values")
    else:
        _answer(seconds=seconds)


if __name__ == "__main__":
    if sys.argv[1] == "facts":
        _answer_facts(int(sys.argv[2]))
    else:
        _answer_compile(sys.argv[2])
