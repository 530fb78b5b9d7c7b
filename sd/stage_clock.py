"""Seconds of the stages of a generation or a training step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StageClock:
    """Seconds by stage, which may recur; on CUDA measured with events, so that no stage waits for the device."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.marks: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Context of one run of a stage."""
        start = self._now()
        yield
        self.marks.append((name, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage, after waiting for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        sums: dict[str, float] = {}
        for name, start, end in self.marks:
            sums[name] = sums.get(name, 0.0) + (start.elapsed_time(end) / 1e3 if self.cuda else end - start)
        return sums
