"""Run a worker in this process."""

from __future__ import annotations

import os

from perf.worker.server import Worker
from perf.worker.wire import parse_response


class InProcessLaunch:
    """A worker in this process: it starts quickly, but shares this process's state and crashes with it."""

    pid = os.getpid()

    def __init__(self):
        self.worker = Worker()
        self.response: dict = {}

    def ask(self, operation: str, timeout_seconds: float, **arguments) -> dict:
        """Return the response to one request. Raises WorkerError; the time limit cannot be enforced here."""
        self.send(operation, **arguments)
        return self.receive(timeout_seconds)

    def send(self, operation: str, **arguments) -> None:
        """Answer a request; `receive` returns the response."""
        self.response = self.worker.handle({"op": operation, **arguments})

    def receive(self, timeout_seconds: float) -> dict:
        """Return the response to the last request. Raises WorkerError."""
        return parse_response(self.response)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.worker = None  # releases the model
