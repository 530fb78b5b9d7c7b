"""The frozen anchor: fixed work without a line of the model's code, timed beside every round.

What the anchor loses between two sessions, the machine lost; so a round's time over its anchor's can be compared between
days where the time alone cannot. It must never change: a new one gets a new NAME, which starts a new series of baselines.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

NAME = "gemm-conv-softmax-1"
SMALL_TIMES = (
    250  # of the same operations on a few numbers each: a model's dispatch, which slows down apart from its arithmetic
)
REPEATS = 3  # the middle one counts
# Shapes in SD's proportions; on a CPU about 15 ms a repeat on one core, on a large GPU about 5 ms.
SHAPES = {
    "cpu": {"dtype": torch.float32, "gemm": 512, "channels": 64, "cells": 32, "tokens": 512, "times": 2},
    "cuda": {"dtype": torch.float16, "gemm": 4096, "channels": 320, "cells": 64, "tokens": 4096, "times": 8},
}


class Anchor:
    """The workload with its tensors on `device`; calling it does the work once, and returns when it is queued."""

    def __init__(self, device: torch.device):
        shapes = SHAPES["cuda" if device.type == "cuda" else "cpu"]
        generator = torch.Generator().manual_seed(0)

        def draw(*size):
            return torch.randn(size, generator=generator).to(device=device, dtype=shapes["dtype"])

        side, channels, cells, tokens = (shapes[name] for name in ("gemm", "channels", "cells", "tokens"))
        self.a, self.b = draw(side, side), draw(side, side)
        self.image, self.kernel = draw(2, channels, cells, cells), draw(channels, channels, 3, 3)
        self.scores = draw(8, tokens, tokens)
        self.times = shapes["times"]
        self.small = draw(32, 32), draw(2, 8, 8, 8), draw(8, 8, 3, 3), draw(4, 16, 16)

    @torch.no_grad()
    def __call__(self) -> None:
        for _ in range(self.times):
            torch.mm(self.a, self.b)
            F.conv2d(self.image, self.kernel, padding=1)
            torch.softmax(self.scores, dim=-1)
        a, image, kernel, scores = self.small
        for _ in range(SMALL_TIMES):
            torch.mm(a, a)
            F.conv2d(image, kernel, padding=1)
            torch.softmax(scores, dim=-1)


@torch.no_grad()
def matmul_flops_per_second(device: torch.device, dtype: torch.dtype, clock) -> float:
    """The best rate of a square matrix product here, in FLOP/s: the ceiling against which a model's rate is stated.

    clock() must wait for the device. The largest of 5 after a warm-up: a ceiling is a maximum.
    """
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    seconds = []
    for _ in range(6):
        begin = clock()
        torch.mm(a, a)
        seconds.append(clock() - begin)
    return 2.0 * side**3 / min(seconds[1:])


@torch.no_grad()
def copy_bytes_per_second(device: torch.device, clock) -> float:
    """The best rate of a copy in this device's memory, in bytes read and written per second: the other ceiling.

    The two buffers, together 2 GiB on a GPU and 128 MiB on a CPU, are written before: memory that nothing has touched has
    no pages to read. clock() as above, and the largest of 5 after a warm-up. A CPU with a cache in their order gives the
    cache's rate.
    """
    count = 2 ** (30 if device.type == "cuda" else 26)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    seconds = []
    for _ in range(6):
        begin = clock()
        target.copy_(source)
        seconds.append(clock() - begin)
    return 2.0 * count / min(seconds[1:])
