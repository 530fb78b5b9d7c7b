"""The reference workload of the machine's speed: fixed torch operations, timed after every round.

It contains no code of the model. A change of its time between two sessions is a change of the machine, so the ratio of a
round to its reference workload is comparable between days. It must never change; a new version gets a new name, which
starts a new series of baselines. The two functions below measure the device's peak rates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

REPEATS = 3  # per round; the median counts
# Shapes in SD's proportions: about 15 ms on one CPU core and, by its rates, on a large GPU. small: repeats of the operations
# on tiny tensors, whose cost is dispatch, which changes apart from arithmetic. A GPU has none: with 250 the workload took 13 to
# 21 ms beside an H200 whose rounds of `fast` varied by 5 %, so that jitter of the host would have passed for drift of the GPU.
# Without them it has not run on a GPU yet.
SHAPES: dict[str, dict[str, Any]] = {
    "cpu": {
        "name": "gemm-conv-softmax-1",
        "dtype": torch.float32,
        "gemm": 512,
        "channels": 64,
        "cells": 32,
        "tokens": 512,
        "times": 2,
        "small": 250,
    },
    "cuda": {
        "name": "gemm-conv-softmax-2",
        "dtype": torch.float16,
        "gemm": 4096,
        "channels": 320,
        "cells": 64,
        "tokens": 4096,
        "times": 40,
        "small": 0,
    },
}
RATE_REPEATS = 6  # the first is a warm-up


class ReferenceWorkload:
    """The workload with its tensors on `device`. A call queues the work once."""

    def __init__(self, device: torch.device):
        shapes = SHAPES["cuda" if device.type == "cuda" else "cpu"]
        # Drawn on the device: on a GPU's host 134 million numbers would take a second of every launch.
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device).to(shapes["dtype"])

        side, channels, cells, tokens = (shapes[name] for name in ("gemm", "channels", "cells", "tokens"))
        self.a, self.b = draw(side, side), draw(side, side)
        self.image, self.kernel = draw(2, channels, cells, cells), draw(channels, channels, 3, 3)
        self.scores = draw(8, tokens, tokens)
        self.name, self.times, self.small_repeats = (shapes[name] for name in ("name", "times", "small"))
        self.small = draw(32, 32), draw(2, 8, 8, 8), draw(8, 8, 3, 3), draw(4, 16, 16)
        tensors = self.a, self.b, self.image, self.kernel, self.scores, *self.small
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @torch.no_grad()
    def __call__(self) -> None:
        for _ in range(self.times):
            torch.mm(self.a, self.b)
            F.conv2d(self.image, self.kernel, padding=1)
            torch.softmax(self.scores, dim=-1)
        a, image, kernel, scores = self.small
        for _ in range(self.small_repeats):
            torch.mm(a, a)
            F.conv2d(image, kernel, padding=1)
            torch.softmax(scores, dim=-1)

    def seconds(self, clock: Callable[[], float]) -> float:
        """Median seconds of REPEATS calls."""
        return sorted(_durations(self, clock, REPEATS))[REPEATS // 2]


@torch.no_grad()
def matmul_flops_per_second(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Peak FLOP/s of a square matrix product: the denominator of a fraction of peak. `clock` waits for the device."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    return 2.0 * side**3 / min(_durations(lambda: torch.mm(a, a), clock, RATE_REPEATS)[1:])


@torch.no_grad()
def copy_bytes_per_second(device: torch.device, clock: Callable[[], float]) -> float:
    """Peak rate of a copy in device memory, bytes read plus bytes written per second.

    The two buffers (2 GiB together on a GPU, 128 MiB on a CPU) are written first, so that their pages exist. On a CPU
    whose cache is of that size this is the rate of the cache.
    """
    count = 2 ** (30 if device.type == "cuda" else 26)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2.0 * count / min(_durations(lambda: target.copy_(source), clock, RATE_REPEATS)[1:])


def _durations(work: Callable[[], object], clock: Callable[[], float], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        begin = clock()
        work()
        seconds.append(clock() - begin)
    return seconds
