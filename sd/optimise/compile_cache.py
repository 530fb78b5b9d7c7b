"""A persistent compile cache: a later process makes its first image without compiling.

Source: torch.compiler.save_cache_artifacts and load_cache_artifacts.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch

from sd.errors import ConfigError
from sd.features import require

PREFIX, SUFFIX = "torch-compile", ".cache"  # of the portable files


def open_compile_cache(directory: Path) -> None:
    """Make torch.compile cache in `directory`; call it before the first compilation.

    The machine that wrote the directory reuses all of it. For another machine of the same model, copy the files
    torch-compile*.cache alone: torch unpacks their portable part, which is all GPU code; C++ kernels for a CPU are compiled
    again. They hold pickles and machine code that are executed: load them only from a trusted source. Raises Unavailable
    where torch has no such cache, ConfigError for an unusable directory.
    """
    require("compile_cache", "--compile-cache")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        inductor = directory / "inductor"
        files = [] if inductor.exists() else sorted(directory.glob(f"{PREFIX}*{SUFFIX}"))
        contents = {file: file.read_bytes() for file in files}
    except OSError as error:
        raise ConfigError(f"--compile-cache {directory}: cannot be used ({error.strerror})") from None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(inductor.absolute())
    os.environ["TRITON_CACHE_DIR"] = str((directory / "triton").absolute())
    for file, content in contents.items():
        if torch.compiler.load_cache_artifacts(content) is None:
            raise ConfigError(f"--compile-cache {file}: is no cache of this torch ({torch.__version__}); remove it")


def save_compile_cache(directory: Path) -> None:
    """Write what this process compiled or loaded to a file of its own content, atomically. Raises ConfigError if that fails.

    Other batches and sizes have other files, and the same ones the same file. Packages of `aotinductor` are not among them.
    """
    if "torch._dynamo" not in sys.modules:  # it compiled nothing, and its import takes more than a second
        return
    artifacts = torch.compiler.save_cache_artifacts()
    if artifacts is None:
        return
    content, info = artifacts
    keys_by_kind = vars(info).get("artifacts", vars(info))  # torch 2.7 has a field for each kind
    keys = sorted(f"{kind} {key}" for kind, keys in keys_by_kind.items() for key in keys)
    file = directory / f"{PREFIX}-{hashlib.sha256(repr(keys).encode()).hexdigest()[:16]}{SUFFIX}"
    partial = file.with_suffix(f".{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    except OSError as error:
        raise ConfigError(f"--compile-cache {directory}: cannot be written ({error.strerror})") from None
