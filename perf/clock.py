"""Clocks: one that waits for the device, one of CPU time, and one that replays what was measured elsewhere.

Imports neither torch nor pytest.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable

CLOCKS = ("wall", "cpu")


def on_cuda() -> bool:
    """Whether this process uses a CUDA device."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def wait_for_device() -> None:
    """Return when the CUDA device, if this process uses one, has finished its work."""
    if on_cuda():
        sys.modules["torch"].cuda.synchronize()


def wall_clock() -> float:
    """Seconds of wall time, read when the device has finished."""
    wait_for_device()
    return time.perf_counter()


def cpu_clock() -> float:
    """Seconds of CPU time of this process, all threads together: steadier than wall time where cores are shared."""
    wait_for_device()
    return time.process_time()


def clock(name: str) -> Callable[[], float]:
    """The clock of that name, one of CLOCKS."""
    return {"wall": wall_clock, "cpu": cpu_clock}[name]


class ReplayClock:
    """A clock that moves by recorded durations, so that rounds measured in turns pass through `benchmark.pedantic`:

    >>> clock = ReplayClock([0.5, 0.7])
    >>> begin = clock(); clock.advance(); round(clock() - begin, 9)
    0.5
    """

    def __init__(self, durations: Iterable[float] = ()):
        self.load(durations)

    def load(self, durations: Iterable[float]) -> None:
        """Start again with other durations, in seconds."""
        self.durations = iter(list(durations))
        self.now = 0.0

    def advance(self) -> None:
        """What stands for the measured work: the clock moves on by the next duration."""
        self.now += next(self.durations)

    def __call__(self) -> float:
        return self.now
