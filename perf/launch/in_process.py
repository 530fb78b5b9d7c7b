"""A worker in this process."""

from __future__ import annotations

import os

from perf.worker.server import Worker
from perf.worker.wire import parse_response


class InProcessLaunch:
    """The same worker in this process: quick, but nothing is fresh, and a crash is this process's."""

    pid = os.getpid()

    def __init__(self):
        self.worker = Worker()

    def ask(self, operation: str, timeout_seconds: float, **arguments) -> dict:
        """The answer to one request; the time limit cannot be kept here."""
        return parse_response(self.worker.handle({"op": operation, **arguments}))

    def close(self) -> None:
        """Let go of the model."""
        self.worker = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
