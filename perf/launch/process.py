"""Run a worker in a fresh process and exchange JSON lines with it over pipes, with a time limit on every response.

Every failure of a worker (it dies, hangs, runs out of memory or sends an invalid response) is raised as a one-line WorkerError.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from perf.worker.wire import PROTOCOL, WorkerError, one_line, parse_response

ROOT = Path(__file__).resolve().parents[2]  # the folder of `perf` and this tree's `sd`
START_SECONDS = 60.0  # for an interpreter to start and send its greeting
EXIT_SECONDS = 5.0  # for a process that has closed its pipe to exit by itself, which yields its exit status
POLL_SECONDS = 1.0  # interval of liveness checks: a child of a dead worker may keep the pipe open
MAX_LINE_BYTES = 1 << 20
STDERR_BYTES = 4000  # read from the end of stderr for an error message


@functools.cache
def import_root() -> Path:
    """The folder from which workers import `perf` and this tree's `sd`.

    Of an installed package it is a temporary one with links to these two: beside them are all other packages of this
    interpreter, such as its torch, which another interpreter must not import.
    """
    if ROOT.name not in ("site-packages", "dist-packages"):
        return ROOT
    folder = tempfile.TemporaryDirectory(prefix="sd-perf-packages-")
    atexit.register(folder.cleanup)
    for name in ("perf", "sd"):
        Path(folder.name, name).symlink_to(ROOT / name, target_is_directory=True)
    return Path(folder.name)


@dataclass(frozen=True)
class Interpreter:
    """The Python of a launch and the `sd` to measure.

    source: a folder that contains `sd`; `perf` always comes from this tree, so that two commits are measured by the same
    code. environment: variables to set. path: further folders to import from, before those of PYTHONPATH. tree: (the root of
    a repository, another commit of it), where the user's own engines of that commit are.
    """

    python: str = sys.executable
    source: Path = field(default_factory=import_root)
    environment: tuple[tuple[str, str], ...] = ()
    tree: tuple[Path, Path] | None = None
    path: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """The command line of a worker."""
        return [self.python, "-m", "perf.worker"]

    def variables(self) -> dict[str, str]:
        """The worker's environment: this process's, with `sd` and `perf` first on the import path."""
        path = [str(self.source), str(import_root()), *self.path, *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)), **dict(self.environment)}


class ProcessLaunch:
    """A worker process; a context manager that kills it, with all its children, on exit. Raises WorkerError."""

    def __init__(self, interpreter: Interpreter, command: list[str] | None = None):
        try:
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        except OSError as error:
            raise WorkerError("died", f"a worker cannot be started: {error.strerror}") from None
        try:
            self.process = subprocess.Popen(
                command or interpreter.command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                cwd=interpreter.source,
                env=interpreter.variables(),
                start_new_session=True,  # to kill it together with its children
            )
        except OSError as error:
            self._stderr.close()
            raise WorkerError("died", f"{interpreter.python} cannot be started: {error.strerror}") from None
        self._closed = False
        self._unanswered = 0
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            protocol = self.receive(START_SECONDS).get("protocol")
            if protocol != PROTOCOL:
                message = f"the worker uses protocol {repr(protocol)[:80]}, not {PROTOCOL}"
                raise WorkerError("invalid_response", message)
        except BaseException:
            self.__exit__()
            raise

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self.process.pid

    def ask(self, operation: str, timeout_seconds: float, **arguments) -> dict:
        """Return the response to one request."""
        interrupted = self._unanswered  # requests whose responses Ctrl-C did not wait for
        self.send(operation, **arguments)
        for _ in range(interrupted):
            with contextlib.suppress(WorkerError):
                self.receive(timeout_seconds)
        return self.receive(timeout_seconds)

    def send(self, operation: str, **arguments) -> None:
        """Send a request, whose response `receive` waits for."""
        line = json.dumps({"op": operation, **arguments}) + "\n"
        with contextlib.suppress(queue.Empty):  # an unsolicited line would be taken for the response to this request
            if not self._unanswered:
                self._fail(self._lines.get_nowait())
        self._unanswered += 1
        try:
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        except OSError:
            self._fail(None)

    def receive(self, timeout_seconds: float) -> dict:
        """Return the next response."""
        line = self._line(timeout_seconds)
        self._unanswered = max(0, self._unanswered - 1)  # the greeting answers no request
        if line is None:
            self._fail(None)
        try:
            return parse_response(json.loads(line, parse_constant=_reject_constant))
        except (ValueError, RecursionError):
            self._fail(line)

    def _line(self, timeout_seconds: float) -> bytes | None:
        """The next line, or None if the process has exited."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            left = deadline - time.monotonic()
            exited = self.process.poll() is not None
            try:
                return self._lines.get(timeout=max(0.0, min(left, POLL_SECONDS)))
            except queue.Empty:
                if exited:
                    return None
                if left <= POLL_SECONDS:
                    self.close()
                    message = f"the worker did not respond within {timeout_seconds:.0f} s and was killed"
                    raise WorkerError("hung", message) from None

    def _read(self) -> None:
        for line in iter(lambda: self.process.stdout.readline(MAX_LINE_BYTES), b""):
            if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                break  # the process exited in the middle of the line
            self._lines.put(line)
        self._lines.put(None)

    def _fail(self, line: bytes | None) -> NoReturn:
        """Kill the worker and raise the WorkerError for an invalid line, or for its exit where `line` is None."""
        if line is not None:
            self.close()
            start = line[:80].decode("utf-8", "replace")
            raise WorkerError("invalid_response", f"the worker sent an invalid response: {start!r}") from None
        try:
            code = self.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        last_line = self._last_stderr_line()
        message = f"the worker {_exit_description(code)}" + (f": {last_line}" if last_line else "")
        raise WorkerError("died", message) from None

    def _last_stderr_line(self) -> str:
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - STDERR_BYTES))
        lines = self._stderr.read().decode("utf-8", "replace").splitlines()  # progress bars end lines with \r
        return next(filter(None, map(one_line, reversed(lines))), "")[:300]

    def close(self) -> None:
        """Kill the process and its children; further calls have no effect."""
        if self._closed:  # the process group id may have been reused
            return
        self._closed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):  # already exited
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
        with contextlib.suppress(OSError):  # flushing a request that a dead worker did not read
            self.process.stdin.close()
        self._reader.join(EXIT_SECONDS)
        if not self._reader.is_alive():  # otherwise a process outside the group still holds the pipe
            self.process.stdout.close()
        self._stderr.close()


def _reject_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _exit_description(code: int | None) -> str:
    if code is None:
        return "closed its pipe without exiting, and was killed"
    if code >= 0:
        return f"ended with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = f"signal {-code}"
    hint = " (probably by the system for lack of memory, unless you did it)" if code == -signal.SIGKILL else ""
    return f"was ended by {name}{hint}"
