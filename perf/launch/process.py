"""A launch: one configuration in a fresh process, asked over pipes, with a time limit on every answer.

Whatever a worker does - dies, hangs, prints rubbish, runs out of memory - comes back as one `WorkerError` with one line.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from perf.worker.wire import PROTOCOL, WorkerError, one_line, parse_response

ROOT = Path(__file__).resolve().parents[2]  # where `perf` and this tree's `sd` are imported from
START_SECONDS = 60.0  # for an interpreter to start and say so
EXIT_SECONDS = 5.0  # for a process that has closed its pipe to end by itself, so that its own status is known
LOOK_SECONDS = 1.0  # between looks at whether the process lives: a child of a dead one may hold its pipe open
LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class Interpreter:
    """Which Python a launch runs in, and which `sd` it measures.

    source: a folder that holds `sd`; the harness itself always comes from this tree, so that two commits are measured
    by the same code. environment: variables to set.
    """

    python: str = sys.executable
    source: Path = ROOT
    environment: tuple[tuple[str, str], ...] = ()

    def command(self) -> list[str]:
        """What is started."""
        return [self.python, "-m", "perf.worker"]

    def variables(self) -> dict[str, str]:
        """The environment of the process: this one's, with `sd` and `perf` first on the import path."""
        path = [str(self.source), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)), **dict(self.environment)}


class ProcessLaunch:
    """A worker process. Use as a context: it is ended on the way out, with all that it started."""

    def __init__(self, interpreter: Interpreter, command: list[str] | None = None):
        try:
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
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
                start_new_session=True,  # so that it and its children can be ended together
            )
        except OSError as error:
            self._stderr.close()
            raise WorkerError("died", f"{interpreter.python} cannot be started: {error.strerror}") from None
        self._closed = False
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            hello = self._answer(START_SECONDS)
            if hello.get("protocol") != PROTOCOL:
                spoken = repr(hello.get("protocol"))[:80]
                raise WorkerError("rubbish", f"the worker speaks protocol {spoken}, not {PROTOCOL}")
        except BaseException:
            self.__exit__()
            raise

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self.process.pid

    def ask(self, operation: str, timeout_seconds: float, **arguments) -> dict:
        """The answer to one request. Raises WorkerError."""
        line = json.dumps({"op": operation, **arguments}) + "\n"
        with contextlib.suppress(queue.Empty):  # else what it said unasked would be taken for the answer to this
            early = self._lines.get_nowait()
            raise self._rubbish(early) if early is not None else self._died()
        try:
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        except OSError:
            raise self._died() from None
        return self._answer(timeout_seconds)

    def _answer(self, timeout_seconds: float) -> dict:
        line = self._line(timeout_seconds)
        if line is None:
            raise self._died()
        try:
            return parse_response(json.loads(line, parse_constant=_refuse))
        except (ValueError, RecursionError):
            raise self._rubbish(line) from None

    def _line(self, timeout_seconds: float) -> bytes | None:
        """The next line, or None when the process has ended. Raises WorkerError after the time limit."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            left = deadline - time.monotonic()
            ended = self.process.poll() is not None
            try:
                return self._lines.get(timeout=max(0.0, min(left, LOOK_SECONDS)))
            except queue.Empty:
                if ended:
                    return None
                if left <= LOOK_SECONDS:
                    self.close()
                    words = f"the worker gave no answer in {timeout_seconds:.0f} s and was ended"
                    raise WorkerError("hung", words) from None

    def _read(self) -> None:
        for line in iter(lambda: self.process.stdout.readline(LONGEST_LINE), b""):
            if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                break  # the process ended in the middle of it
            self._lines.put(line)
        self._lines.put(None)

    def _rubbish(self, line: bytes) -> WorkerError:
        self.close()
        start = line[:80].decode("utf-8", "replace")
        return WorkerError("rubbish", f"the worker printed what is no answer: {start!r}")

    def _died(self) -> WorkerError:
        try:
            code = self.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        if code is None:
            how = "closed its pipe without ending, and was ended"
        elif code < 0:
            how = f"was ended by {_signal_name(-code)}"
        else:
            how = f"ended with status {code}"
        if code == -signal.SIGKILL:
            how += " (if you did not do it, the system ran out of memory)"
        said = self._last_words()
        return WorkerError("died", f"the worker {how}" + (f": {said}" if said else ""))

    def _last_words(self) -> str:
        """The last line that the process wrote to stderr."""
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - 4000))
        lines = self._stderr.read().decode("utf-8", "replace").splitlines()  # at \r too, as of a progress bar
        return next(filter(None, map(one_line, reversed(lines))), "")[:300]

    def close(self) -> None:
        """End the process and its children; may be called again."""
        if self._closed:  # the number may be another group's by now
            return
        self._closed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):  # already gone
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
        with contextlib.suppress(OSError):  # the buffer of a request that a dead worker did not take
            self.process.stdin.close()
        self._reader.join(EXIT_SECONDS)
        if not self._reader.is_alive():  # else something that left the process group still has the pipe
            self.process.stdout.close()
        self._stderr.close()


def _refuse(constant: str):
    raise ValueError(f"{constant} is not JSON")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
