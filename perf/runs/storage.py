"""The folder of saved runs: its name, the next number in it, and writing that leaves a whole file or none."""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from perf.runs.baselines import NUMBERED
from perf.runs.saved_run import BaselineError, shown

MARKER = re.compile(r"\.(\d{4,})\.taken")


def _safe(text: object, length: int = 60) -> str:
    """Only what every file system allows in a name, and no shell treats specially."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", str(text))[:length].strip("-._")


def storage_name(stack: Mapping[str, object]) -> str:
    """A folder name from `machine_info.stack`: `NVIDIA-H200_570.86_torch2.15.0+cu132`; a CPU has no driver to name.

    It keeps different machines apart for the eye; what may be compared is decided by the files (`why_foreign`).
    """
    torch, cuda = str(stack.get("torch") or "-unknown"), stack.get("cuda")
    if cuda and "+" not in torch:
        torch += f"+cu{str(cuda).replace('.', '')}"
    parts = [_safe(stack.get("name") or "unknown"), _safe(stack.get("driver") or ""), _safe(f"torch{torch}")]
    return "_".join(part for part in parts if part)


def write_atomically(path: str | os.PathLike[str], content: str | Mapping[str, object]) -> None:
    """Replace the file, or make it, so that at every moment, kill -9 included, it is the old one or the new one whole.

    The mode is the old file's, or what the umask says. A mapping becomes JSON; raises ValueError if it holds NaN, and
    BaselineError where the system refuses to write (disk full, no rights), the old file being as it was.
    """
    text = content if isinstance(content, str) else json.dumps(content, indent=1, allow_nan=False) + "\n"
    target = Path(os.path.realpath(path))  # through a link: replacing would put a file in the link's place
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile's, which are private whatever the umask says: a shared storage is for others to read.
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
        reason = f"cannot be written: {error.strerror}; what was there is unchanged, make room or name another folder"
        raise BaselineError(f"{shown(Path(path))}: {reason}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def _flush_folder(folder: Path) -> None:
    """A rename is on the disk when its folder is; where folders cannot be opened or flushed there is nothing to do."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def saved_runs_in(folder: Path) -> list[Path]:
    """The saved runs under a folder, by name: all JSON but the traces that `--perf-trace` leaves."""
    return sorted(path for path in folder.rglob("*.json") if not path.name.endswith(".trace.json"))


def of_another_kind(path: Path, document: object) -> bool:
    """Whole JSON in which nothing was measured, found in a folder: a compile cache's, or the state of `gpu-run`."""
    return not NUMBERED.fullmatch(path.name) and not (isinstance(document, dict) and "benchmarks" in document)


def save_numbered(
    folder: str | os.PathLike[str], label: str, content: str | Mapping[str, object], wanted: int | None = None
) -> Path:
    """Write `NNNN_label.json` and return its path: number `wanted` if that is free, else the next after the highest.

    Safe with several writers at once, and nothing is overwritten. A number is held by an exclusively created marker until
    its file is there. A writer killed in between leaves the marker, and so a gap in the numbers, but never a half or an
    empty run. Raises as `write_atomically` does.
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
            raise BaselineError(
                f"{shown(folder)}: cannot be written: {error.strerror}; make room or name another folder"
            ) from error
        try:
            if number not in _numbers(folder, NUMBERED):  # else another writer has finished since it was listed
                path = folder / f"{number:04d}_{_safe(label, 80) or 'run'}.json"
                write_atomically(path, content)
                return path
        finally:
            with suppress(FileNotFoundError):
                marker.unlink()


def _numbers(folder: Path, pattern: re.Pattern[str]) -> set[int]:
    return {int(match[1]) for match in map(pattern.fullmatch, os.listdir(folder)) if match}
