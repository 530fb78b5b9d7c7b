"""SHA-256 fingerprints of a configuration's weights and of source trees, without importing torch."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from perf.configurations.configuration import Configuration
from sd.choices import EMBEDDED_INPAINTING, EMBEDDED_WEIGHTS


def identity(configuration: Configuration) -> dict[str, str | None]:
    """The origin and hash of the weights: `kind` is "tiny", "random", "file" or "own". Raises OSError for an unreadable file."""
    if configuration.checkpoint is not None:
        return {"kind": "file", "sha256": sha256(Path(configuration.checkpoint))}
    if configuration.own:  # in its code, or where that finds them
        return {"kind": "own", "sha256": None}
    if configuration.model == "tiny":
        return {"kind": "tiny", "sha256": sha256(EMBEDDED_WEIGHTS)}
    if configuration.model == "tiny-inpaint":
        both = sha256(EMBEDDED_WEIGHTS) + sha256(EMBEDDED_INPAINTING)
        return {"kind": "tiny", "sha256": hashlib.sha256(both.encode()).hexdigest()}
    return {"kind": "random", "sha256": None}


def source_sha256(folder: Path) -> str:
    """The hash of all Python files below a folder, by relative path and content."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def sha256(path: Path) -> str:
    """The hash of a file, or of all files of a folder in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
