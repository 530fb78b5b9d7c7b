"""What is done around a round: the device is watched where there is something to watch it with."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from perf.telemetry import Monitor, invalid_reason


class Watch:
    """Telemetry around a round; use as `with watch(pid) as watched`."""

    def __init__(self, gpu):
        self.monitor, self.seen = Monitor(gpu), set()
        self.telemetry, self.invalid = None, None

    @contextlib.contextmanager
    def __call__(self, pid: int):
        self.seen.add(pid)  # one that has just ended may be listed a moment longer
        self.telemetry, self.invalid = None, None
        self.monitor.start(self.seen)
        try:
            yield self
        finally:
            telemetry = self.monitor.stop()
            self.telemetry, self.invalid = telemetry.as_dict(), invalid_reason(telemetry)


@dataclass
class _Unwatched:
    telemetry = None
    invalid = None


@contextlib.contextmanager
def no_watch(pid: int):
    """Where there is no telemetry every round is valid."""
    yield _Unwatched()
