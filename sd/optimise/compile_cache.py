"""A compile cache that outlives the process, so that the next one reaches its first picture without compiling.

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
    """Let torch.compile find and keep its work in `directory`; to be called before anything is compiled.

    On the machine that filled it, everything is found there. On another of the same kind, copy FILE alone: torch
    unpacks from it what is portable, which is all of a GPU's code; C++ kernels of a CPU are compiled again. It holds
    pickles and machine code that will run, so take it from nobody whose programs you would not run. Raises Unavailable
    where torch has no such cache, ConfigError where the directory cannot be used.
    """
    require("compile_cache", "--compile-cache")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / FILE
        saved = file.read_bytes() if file.exists() else None
    except OSError as error:
        raise ConfigError(f"--compile-cache {directory}: cannot be used ({error.strerror})") from None
    local = directory / "inductor"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(local.absolute())
    os.environ["TRITON_CACHE_DIR"] = str((directory / "triton").absolute())
    if saved is not None and not local.exists() and torch.compiler.load_cache_artifacts(saved) is None:
        raise ConfigError(f"--compile-cache {file}: is no cache of this torch ({torch.__version__}); remove it")


def save_compile_cache(directory: Path) -> None:
    """Write FILE from what this process compiled or found, in one step, so that a reader never sees half of it."""
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
