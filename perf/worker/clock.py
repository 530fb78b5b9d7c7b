"""Clocks of a worker, in seconds. Both wait for the CUDA device first, where the process uses one."""

from __future__ import annotations

import resource
import sys
import time


def uses_cuda() -> bool:
    """Whether this process has initialised CUDA. Does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def synchronize() -> None:
    """Wait for queued work of the CUDA device, if this process uses one."""
    if uses_cuda():
        sys.modules["torch"].cuda.synchronize()


def wall_clock() -> float:
    """Wall time."""
    synchronize()
    return time.perf_counter()


def cpu_clock() -> float:
    """CPU time of this process, summed over threads: less noisy than wall time on shared cores."""
    synchronize()
    return time.process_time()


def cpu_clock_with_children() -> float:
    """CPU time of this process and of the processes that it has waited for: of an engine that may start some."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return cpu_clock() + children.ru_utime + children.ru_stime


CLOCKS = {"wall": wall_clock, "cpu": cpu_clock}
