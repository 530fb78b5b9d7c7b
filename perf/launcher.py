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
from dataclasses import dataclass
from pathlib import Path

from perf.worker import KINDS, PROTOCOL, Worker

ROOT = Path(__file__).resolve().parent.parent  # where `perf` and this tree's `sd` are imported from
START_SECONDS = 60.0  # for an interpreter to start and say so
LONGEST_LINE = 1 << 20


class WorkerError(Exception):
    """A launch that gave no answer, or an error as its answer.

    kind: one of perf.worker.KINDS, or `died`, `hung`, `rubbish` of the process, or `wrong_picture` of what it made.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


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
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
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
            raise WorkerError("died", f"{interpreter.python} cannot be started: {error.strerror}") from None
        self._lines = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            hello = self._answer(START_SECONDS)
            if hello.get("protocol") != PROTOCOL:
                raise WorkerError("rubbish", f"the worker speaks protocol {hello.get('protocol')!r}, not {PROTOCOL}")
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self.process.pid

    def ask(self, operation: str, timeout_seconds: float, **arguments) -> dict:
        """The answer to one request. Raises WorkerError."""
        line = json.dumps({"op": operation, **arguments}) + "\n"
        try:
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        except OSError:
            raise self._died() from None
        return self._answer(timeout_seconds)

    def _answer(self, timeout_seconds: float) -> dict:
        try:
            line = self._lines.get(timeout=timeout_seconds)
        except queue.Empty:
            self.close()
            raise WorkerError("hung", f"the worker gave no answer in {timeout_seconds:.0f} s and was ended") from None
        if line is None:
            raise self._died()
        try:
            answer = json.loads(line)
            return read_answer(answer)
        except (ValueError, RecursionError):
            self.close()
            start = line[:80].decode("utf-8", "replace")
            raise WorkerError("rubbish", f"the worker printed what is no answer: {start!r}") from None

    def _read(self) -> None:
        for line in iter(lambda: self.process.stdout.readline(LONGEST_LINE), b""):
            self._lines.put(line)
        self._lines.put(None)

    def _died(self) -> WorkerError:
        self.close()
        code = self.process.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        if code == -signal.SIGKILL:
            how += " (if you did not do it, the system ran out of memory)"
        said = self._last_words()
        return WorkerError("died", f"the worker {how}" + (f": {said}" if said else ""))

    def _last_words(self) -> str:
        """The last line that the process wrote to stderr."""
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - 4000))
        lines = self._stderr.read().decode("utf-8", "replace").split("\n")
        return next((" ".join(line.split())[:300] for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        """End the process and its children; may be called again."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # already gone
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
        self.process.stdin.close()
        self._stderr.close()


class InProcessLaunch:
    """The same worker in this process: quick, but nothing is fresh, and a crash is this process's."""

    pid = os.getpid()

    def __init__(self):
        self.worker = Worker()

    def ask(self, operation: str, timeout_seconds: float, **arguments) -> dict:
        """The answer to one request; the time limit cannot be kept here."""
        return read_answer(self.worker.handle({"op": operation, **arguments}))

    def close(self) -> None:
        """Let go of the model."""
        self.worker = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def read_answer(answer) -> dict:
    """The content of an answer. Raises WorkerError for an error, and ValueError for what is no answer."""
    if isinstance(answer, dict) and isinstance(answer.get("ok"), dict):
        return answer["ok"]
    error = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(error, dict) and error.get("kind") in KINDS and isinstance(error.get("message"), str):
        raise WorkerError(error["kind"], error["message"])
    raise ValueError("no answer")
