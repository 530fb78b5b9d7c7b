"""Kernels of our own in C++, compiled at their first use by the compiler of inductor and kept in the user's cache folder."""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from sd.choices import cpp_compiler
from sd.errors import SDWarning
from sd.features import has, missing, processor_has

Loaded = TypeVar("Loaded")


def missing_requirement(kernel: str, device: torch.device, feature: str, instructions: str) -> str | None:
    """None where the kernel should compile and run, else the reason. feature: of sd.features. kernel: its name in the reason."""
    if device.type != "cpu":
        return f"the {kernel} kernel runs on a CPU, and the device is {device}"
    if not has(feature):
        return missing(feature)
    if platform.system() != "Linux" or not processor_has(instructions):
        return f"the {kernel} kernel needs Linux and a processor with {instructions}"
    if cpp_compiler() is None:
        return f"the {kernel} kernel needs a C++ compiler: install g++, or name one in CXX"
    return None


def compiled(
    source: Path, name: str, options: Sequence[str], libraries: Sequence[str], load: Callable[[str], Loaded]
) -> Loaded:
    """`load` of the shared library of `source`, which is compiled where the cache folder has none for this command.

    name: the start of the file's name. Raises RuntimeError with the reason where it cannot be compiled or loaded.
    """
    command = [cpp_compiler() or "g++", *options, "-shared", "-fPIC"]
    key = hashlib.sha256(source.read_bytes() + repr([*command, *libraries]).encode()).hexdigest()[:16]
    file = cache_folder() / f"{name}-{key}.so"
    try:
        try:
            return load(str(file))
        except OSError:  # there is none, or one that is damaged or of another system
            _compile(source, [*command, str(source), *libraries], file)
            return load(str(file))
    except OSError as error:
        raise RuntimeError(f"{source.name} cannot be compiled or loaded: {error.__cause__ or error}") from None


def _compile(source: Path, command: list[str], file: Path) -> None:
    """Renamed when complete, so that another process never loads a part."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        result = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{command[0]} cannot compile {source.name}: {result.stderr.strip()[:300]}")
        made.replace(file)


@functools.cache
def cache_folder() -> Path:
    """A folder that only this user can write, since what it holds is executed; a temporary one where there is none."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "sd-perf"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        if os.access(folder, os.W_OK) and state.st_uid == os.getuid() and not state.st_mode & 0o022:
            return folder
    except (OSError, RuntimeError):  # the latter from a user without a home
        pass
    problem = "no folder of this user's cache can hold compiled code, so every process compiles anew"
    warnings.warn(f"{problem}; name one in XDG_CACHE_HOME", SDWarning, stacklevel=1)
    temporary = tempfile.TemporaryDirectory(prefix="sd-kernels-")
    atexit.register(temporary.cleanup)
    return Path(temporary.name)
