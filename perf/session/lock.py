"""The lock that allows one measuring session per device. Imports neither torch nor pytest."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import socket
import stat
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import psutil

HOLDER_BYTES = 16_384  # read from a lock file at most
# If a session is killed between fork and exec of a worker, the child holds the lock until it execs.
DEAD_HOLDER_SECONDS = 2.0


@dataclass(frozen=True)
class Holder:
    """The session that holds a device, as stored in the lock file."""

    pid: int
    host: str
    started_unix_seconds: float
    command: str

    def is_alive(self) -> bool:
        """Whether the process exists; True if that is unknown, as on another host."""
        try:
            return self.host != socket.gethostname() or psutil.pid_exists(self.pid)
        except OverflowError:  # not a process id
            return True

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started_unix_seconds))
        host = "" if self.host == socket.gethostname() else f" on {self.host}"
        return " ".join(
            f"pid {self.pid}{host}, since {since}: {self.command}".split()
        )  # the command may contain newlines


class DeviceBusy(RuntimeError):
    """Another session holds the device. holder: None if the lock file is unreadable."""

    def __init__(self, device_key: str, holder: Holder | None):
        self.device_key = device_key
        self.holder = holder
        super().__init__(f"{device_key} is being measured by {holder or 'an unidentified process'}")


class DeviceLock:
    """An exclusive lock on a device among this user's sessions; a context manager.

    It is a flock(2) lock, which the kernel releases however its holder dies; the file content only identifies the holder.
    If a dead holder left its content behind, it is cleared and `notice` has one line about it. Raises DeviceBusy while
    another session holds the device, also within one process, and PermissionError if the folder or file belongs to
    another user. Other users have folders of their own: telemetry reports them as foreign processes on a GPU.
    """

    def __init__(self, device_key: str, folder: Path | str | None = None):
        self.device_key = device_key
        self.folder = Path(lock_folder() if folder is None else folder)
        self.path = self.folder / file_name(device_key)
        self.notice: str | None = None
        self._descriptor: int | None = None

    def __enter__(self) -> DeviceLock:
        descriptor = self._open()
        try:
            self._lock(descriptor)
            if os.fstat(descriptor).st_size:
                left = _read_holder(descriptor) or "an unidentified session"
                self.notice = f"cleared the stale lock of {self.device_key}, left by {left}"
            command = shlex.join([os.path.basename(sys.executable or "python"), *sys.argv])
            holder = Holder(os.getpid(), socket.gethostname(), time.time(), command[: HOLDER_BYTES // 8])
            os.ftruncate(descriptor, 0)
            with contextlib.suppress(OSError):  # on a full disk the lock holds without its holder's name
                os.pwrite(descriptor, json.dumps(asdict(holder)).encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return self

    def __exit__(self, *_) -> None:
        # The empty file stays: unlinking it would let a session that has just opened it lock a deleted name.
        os.ftruncate(self._descriptor, 0)
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # closing alone would leave the lock with a forked child
        os.close(self._descriptor)
        self._descriptor = None

    def _lock(self, descriptor: int) -> None:
        begin = time.monotonic()
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                holder = _read_holder(descriptor)
                if holder is None or holder.is_alive() or time.monotonic() - begin > DEAD_HOLDER_SECONDS:
                    raise DeviceBusy(self.device_key, holder) from None
            time.sleep(0.01)

    def _open(self) -> int:
        """Open the lock file in a folder that only this user can write to; refuses symbolic links."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise PermissionError(f"{self.folder} cannot be used as the lock folder ({error})") from None
        try:
            _require_own(os.fstat(folder), self.folder)
            try:
                descriptor = os.open(self.path.name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=folder)
            except OSError as error:
                raise PermissionError(f"{self.path} cannot be opened as a lock file ({error})") from None
        finally:
            os.close(folder)
        status = os.fstat(descriptor)
        try:
            _require_own(status, self.path)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise PermissionError(f"{self.path} is not a regular file: remove it")
        except PermissionError:
            os.close(descriptor)
            raise
        return descriptor


def lock_folder() -> Path:
    """The folder of this user's locks.

    XDG_RUNTIME_DIR is unsuitable: it is not set for cron jobs and CI runners of the same user, and is emptied at logout
    while sessions may still run.
    """
    return Path(tempfile.gettempdir()) / f"sd-perf-{os.getuid()}"


def file_name(device_key: str) -> str:
    """A file name for any key, distinct for distinct keys."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,99}", device_key):
        return f"{device_key}.lock"
    plain = re.sub(r"[^A-Za-z0-9.-]", "-", device_key).lstrip(".")[:40]
    return f"{plain}_{hashlib.sha256(device_key.encode()).hexdigest()[:16]}.lock"


def _require_own(status: os.stat_result, path: Path) -> None:
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise PermissionError(f"{path} is open to other users: remove it (owner {status.st_uid})")


def _read_holder(descriptor: int) -> Holder | None:
    """The holder in the file; None if it is empty or damaged, for example while the holder is writing it."""
    try:
        content = json.loads(os.pread(descriptor, HOLDER_BYTES, 0))
        types = {"pid": int, "host": str, "started_unix_seconds": (int, float), "command": str}
        values = {field.name: content[field.name] for field in fields(Holder)}
        if not all(isinstance(values[name], type_) for name, type_ in types.items()):
            return None
        str(holder := Holder(**values))  # raises OverflowError for a time outside the calendar
    except (ValueError, KeyError, TypeError, OverflowError, OSError, RecursionError):
        return None
    return holder
