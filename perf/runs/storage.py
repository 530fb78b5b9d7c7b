"""Storage of saved runs: folder names, file numbers and atomic writes."""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from perf.runs.saved_run import NUMBERED, BaselineError, shown

MARKER = re.compile(r"\.(\d{4,})\.taken")


def _safe(text: object, length: int = 60) -> str:
    """Text reduced to characters that every file system allows and no shell treats specially."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", str(text))[:length].strip("-._")


def storage_name(stack: Mapping[str, object]) -> str:
    """A folder name from `machine_info.stack`, such as `NVIDIA-H200_570.86_torch2.15.0+cu132`; a CPU has no driver part.

    The name separates machines for the reader; comparability is decided by the file contents (`why_foreign`).
    """
    torch, cuda = str(stack.get("torch") or "-unknown"), stack.get("cuda")
    if cuda and "+" not in torch:
        torch += f"+cu{str(cuda).replace('.', '')}"
    parts = [_safe(stack.get("name") or "unknown"), _safe(stack.get("driver") or ""), _safe(f"torch{torch}")]
    return "_".join(filter(None, parts))


def write_atomically(path: str | os.PathLike[str], content: str | Mapping[str, object]) -> None:
    """Create or replace a file; after an interruption, kill -9 included, it holds the old or the new content in full.

    The mode is the old file's, else the umask's default. A mapping is written as JSON; raises ValueError if it holds NaN.
    Raises BaselineError on a system error (full disk, permissions) and leaves the old file unchanged.
    """
    text = content if isinstance(content, str) else json.dumps(content, indent=1, allow_nan=False) + "\n"
    target = Path(os.path.realpath(path))  # os.replace on a symbolic link would replace the link itself
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # tempfile ignores the umask and makes private files, which others could not read in a shared storage.
        temporary = target.parent / f".{target.name[:100]}.{secrets.token_hex(8)}.part"
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(file, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            with suppress(FileNotFoundError):
                os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
            os.fsync(file)
        os.replace(temporary, target)
        temporary = None
        _flush_folder(target.parent)
    except OSError as error:
        reason = f"cannot be written: {error.strerror}; the old content is unchanged, free space or name another folder"
        raise BaselineError(f"{shown(Path(path))}: {reason}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def why_unwritable(path: str | os.PathLike[str], folder: bool = False) -> str | None:
    """Why a file, or a folder, cannot be written later, or None. Creates nothing but a temporary file in a folder."""
    target = Path(os.path.realpath(path))
    if target.exists() and target.is_dir() != folder:
        return "is not a folder" if folder else "is a folder"
    nearest = target if target.is_dir() else target.parent
    while not nearest.exists():
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return None
    except OSError as error:
        return f"cannot be written: {error.strerror}"


def _flush_folder(folder: Path) -> None:
    """Make a rename durable, on file systems whose folders can be opened and synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def saved_runs_in(folder: Path) -> list[Path]:
    """All JSON files under a folder except the traces of `--perf-trace`, sorted by path."""
    return sorted(path for path in folder.rglob("*.json") if not path.name.endswith(".trace.json"))


def of_another_kind(path: Path, document: object) -> bool:
    """Whether valid JSON is another program's file rather than a saved run, such as a compile cache entry."""
    return not NUMBERED.fullmatch(path.name) and not (isinstance(document, dict) and "benchmarks" in document)


def save_numbered(
    folder: str | os.PathLike[str], label: str, content: str | Mapping[str, object], wanted: int | None = None
) -> Path:
    """Write `NNNN_label.json` and return its path. The number is `wanted` if it is free, else the highest plus 1.

    Safe with concurrent writers; nothing is overwritten. An exclusively created marker reserves the number until the file
    exists. A writer that is killed leaves its marker, and so a gap in the numbers, but never a partial file.
    Raises as `write_atomically` does.
    """
    folder = Path(folder)
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            taken = _numbers(folder, NUMBERED) | _numbers(folder, MARKER)
            number = max(taken, default=0) + 1 if wanted is None or wanted in taken else wanted
            marker = folder / f".{number:04d}.taken"
            os.close(os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError as error:
            if not folder.is_dir():
                raise BaselineError(f"{shown(folder)}: is not a folder; name another") from error
            continue
        except OSError as error:
            reason = f"cannot be written: {error.strerror}; free space or name another folder"
            raise BaselineError(f"{shown(folder)}: {reason}") from error
        try:
            if number not in _numbers(folder, NUMBERED):  # another writer may have finished since the listing
                path = folder / f"{number:04d}_{_safe(label, 80) or 'run'}.json"
                write_atomically(path, content)
                return path
        finally:
            with suppress(FileNotFoundError):
                marker.unlink()


def _numbers(folder: Path, pattern: re.Pattern[str]) -> set[int]:
    return {int(match[1]) for match in map(pattern.fullmatch, os.listdir(folder)) if match}
