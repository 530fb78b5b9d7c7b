"""One measuring session per device at a time. Imports neither torch nor pytest."""

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

HOLDER_BYTES = 16_384  # more is no file of ours
# A process that was killed while it started another one holds its lock until that one has come to its own program.
DEAD_HOLDER_SECONDS = 2.0


@dataclass(frozen=True)
class Holder:
    """Who holds a device, as its lock file says."""

    pid: int
    host: str
    started_unix_seconds: float
    command: str

    def is_alive(self) -> bool:
        """Whether its process is there, as far as can be seen from here."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):  # another user's; no process id
            pass
        return True

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started_unix_seconds))
        host = "" if self.host == socket.gethostname() else f" on {self.host}"
        return " ".join(f"pid {self.pid}{host}, since {since}: {self.command}".split())  # one line, always


class DeviceBusy(RuntimeError):
    """Another session measures on the device. `holder` is None where its file could not be read."""

    def __init__(self, device_key: str, holder: Holder | None):
        self.device_key = device_key
        self.holder = holder
        super().__init__(f"{device_key} is being measured by {holder or 'a process that did not say who it is'}")


class DeviceLock:
    """Holds a device against other sessions of this user, as a context manager.

    The lock is flock(2)'s, so that the kernel gives it up however its holder dies; the file only says who that is.
    What a dead holder left in it is cleared, and `notice` then says whose it was (one line to show; else None).
    Raises DeviceBusy while another session holds the device, in this process too (one that was killed has a moment to
    let go of it), and PermissionError where the folder or the file is not this user's own.

    Another user's session has its own folder: on a GPU the telemetry sees it as a foreign process.
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
                left = _read_holder(descriptor) or "a session that did not say who it is"
                self.notice = f"cleared the lock of {self.device_key} that was left by {left}"
            command = shlex.join([os.path.basename(sys.executable or "python"), *sys.argv])
            holder = Holder(os.getpid(), socket.gethostname(), time.time(), command[: HOLDER_BYTES // 8])
            os.ftruncate(descriptor, 0)
            with contextlib.suppress(OSError):  # a full disk: the lock holds without its holder's name
                os.pwrite(descriptor, json.dumps(asdict(holder)).encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return self

    def __exit__(self, *_) -> None:
        # The file stays, empty: unlinking it would let a session that opened it a moment ago lock a name that is gone.
        os.ftruncate(self._descriptor, 0)
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # closing is not enough where a forked child has the file open too
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
        """The lock file, in a folder that nobody else can write to; a symbolic link in either place is refused."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise PermissionError(f"{self.folder} cannot be the folder of the locks ({error})") from None
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
                raise PermissionError(f"{self.path} is no plain file: remove it")
        except PermissionError:
            os.close(descriptor)
            raise
        return descriptor


def lock_folder() -> Path:
    """Where this user's locks are.

    Not XDG_RUNTIME_DIR: a login has it, a cron job and a CI runner of the same user have not, and the two would not see
    each other; and it is emptied at logout under a session that goes on.
    """
    return Path(tempfile.gettempdir()) / f"sd-perf-{os.getuid()}"


def file_name(device_key: str) -> str:
    """A file name for any key; keys that differ never share one."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,99}", device_key):
        return f"{device_key}.lock"
    plain = re.sub(r"[^A-Za-z0-9.-]", "-", device_key).lstrip(".")[:40]
    return f"{plain}_{hashlib.sha256(device_key.encode()).hexdigest()[:16]}.lock"


def _require_own(status: os.stat_result, path: Path) -> None:
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise PermissionError(f"{path} is open to other users: remove it (owner {status.st_uid})")


def _read_holder(descriptor: int) -> Holder | None:
    """Who the file names; None for an empty or damaged one, such as that of a holder that is just writing it."""
    try:
        content = json.loads(os.pread(descriptor, HOLDER_BYTES, 0))
        types = {"pid": int, "host": str, "started_unix_seconds": (int, float), "command": str}
        values = {field.name: content[field.name] for field in fields(Holder)}
        if not all(isinstance(values[name], kind) for name, kind in types.items()):
            return None
        str(holder := Holder(**values))  # a time that no calendar has
    except (ValueError, KeyError, TypeError, OverflowError, OSError, RecursionError):
        return None
    return holder
