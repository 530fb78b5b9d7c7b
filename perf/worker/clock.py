"""Clocks: one that waits for the device, one of CPU time, and one that replays what was measured elsewhere.

Imports neither torch nor pytest.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

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
