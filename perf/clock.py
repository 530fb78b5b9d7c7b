"""Clocks for pytest-benchmark: one that waits for the device, and one that replays what was measured elsewhere.

Imports neither torch nor pytest.
"""

from __future__ import annotations

import sys
import time


def synchronised_clock() -> float:
    """Seconds of wall time, read when the CUDA device, if this process uses one, has finished its work."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class ReplayClock:
    """A clock that moves by recorded durations, so that rounds measured in turns pass through `benchmark.pedantic`:

    >>> clock = ReplayClock([0.5, 0.7])
    >>> begin = clock(); clock.advance(); round(clock() - begin, 9)
    0.5
    """

    def __init__(self, durations=()):
        self.load(durations)

    def load(self, durations) -> None:
        """Start again with other durations, in seconds."""
        self.durations = iter(list(durations))
        self.now = 0.0

    def advance(self) -> None:
        """What stands for the measured work: the clock moves on by the next duration."""
        self.now += next(self.durations)

    def __call__(self) -> float:
        return self.now
