"""A persistent compile cache: a later process makes its first image without compiling.

Source: torch.compiler.save_cache_artifacts and load_cache_artifacts.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sd.errors import ConfigError
from sd.features import require

FILE = "torch-compile.cache"


def open_compile_cache(directory: Path) -> None:
    """Make torch.compile cache in `directory`; call it before the first compilation.

    The machine that wrote the directory reuses all of it. For another machine of the same model, copy FILE alone: torch
    unpacks its portable part, which is all GPU code; C++ kernels for a CPU are compiled again. FILE holds pickles and
    machine code that are executed: load it only from a trusted source. Raises Unavailable where torch has no such cache,
    ConfigError for an unusable directory.
    """
    require("compile_cache", "--compile-cache")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / FILE
        artifacts = file.read_bytes() if file.exists() else None
    except OSError as error:
        raise ConfigError(f"--compile-cache {directory}: cannot be used ({error.strerror})") from None
    inductor = directory / "inductor"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(inductor.absolute())
    os.environ["TRITON_CACHE_DIR"] = str((directory / "triton").absolute())
    if artifacts is not None and not inductor.exists() and torch.compiler.load_cache_artifacts(artifacts) is None:
        raise ConfigError(f"--compile-cache {file}: is no cache of this torch ({torch.__version__}); remove it")


def save_compile_cache(directory: Path) -> None:
    """Write what this process compiled or loaded to FILE, atomically. Raises ConfigError if that fails."""
    artifacts = torch.compiler.save_cache_artifacts()
    if artifacts is None:
        return
    file = directory / FILE
    partial = file.with_suffix(f".{os.getpid()}")
    try:
        partial.write_bytes(artifacts[0])
        partial.replace(file)
    except OSError as error:
        raise ConfigError(f"--compile-cache {directory}: cannot be written ({error.strerror})") from None
