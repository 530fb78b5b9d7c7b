"""Run a worker in this process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from perf.worker.server import Worker, collect_garbage, release_device_memory
from perf.worker.wire import parse_response


class InProcessLaunch:
    """A worker in this process: it starts quickly, but shares this process's state and crashes with it."""

    pid = os.getpid()

    def __init__(self, environment: Mapping[str, str] | None = None):
        """environment: variables during each request; other workers of this process may have others."""
        self.environment = dict(environment or {})
        self.worker = Worker()
        self.response: dict = {}

    def ask(self, operation: str, timeout_seconds: float, **arguments) -> dict:
        """Return the response to one request. Raises WorkerError; the time limit cannot be enforced here."""
        self.send(operation, **arguments)
        return self.receive(timeout_seconds)

    def send(self, operation: str, **arguments) -> None:
        """Answer a request; `receive` returns the response."""
        with _variables(self.environment):
            self.response = self.worker.handle({"op": operation, **arguments})

    def receive(self, timeout_seconds: float) -> dict:
        """Return the response to the last request. Raises WorkerError."""
        return parse_response(self.response)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.worker = None
        collect_garbage(every_object=True)  # the model, whose memory another process may need
        release_device_memory()


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
