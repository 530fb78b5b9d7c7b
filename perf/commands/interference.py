"""Interference on every core while a battery measures: the load of a shared machine, reproducible.

    python -m perf.commands.interference bursts 1

`bursts`: all processes work for up to 4 s at once, 40 % of the time, with copies of 48 MiB, more than the cache, and
arithmetic. `wander`: the share of time in which they work rises and falls over minutes, which slowly changes memory
bandwidth and core share. Bursts on one of two cores were seen to do no harm, hence one process a core.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from perf.launch.process import ROOT

KINDS = ("none", "bursts", "wander")
COPY_BYTES = 48 << 20
BURST_SECONDS, BURST_SHARE = 4.0, 0.4
WANDER_SECONDS = (90.0, 300.0)  # periods of the two sines
SLICE_SECONDS = 0.1  # of `wander`: worked and slept within each
MOST_WORK = 0.8  # the largest share of a slice


@contextlib.contextmanager
def interference(kind: str, seed: int) -> Iterator[None]:
    """Run a process on each core that interferes with the measurement. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"interference {kind!r}: choose from {', '.join(KINDS)}")
    count = 0 if kind == "none" else os.cpu_count() or 1
    command = [sys.executable, "-m", "perf.commands.interference", kind, str(seed)]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def wander_share(seconds: float, seed: int) -> float:
    """The share of work of `wander` at a time since its start, between 0 and MOST_WORK."""
    draw = random.Random(seed)
    waves = [math.sin(2 * math.pi * (seconds / period + draw.random())) for period in WANDER_SECONDS]
    return MOST_WORK * (0.5 + sum(waves) / 4)


def bursts(seed: int) -> Iterator[tuple[float, float]]:
    """Yield (seconds of rest, seconds of work), the same for every process with this seed."""
    draw = random.Random(seed)
    while True:
        work = draw.uniform(0.2, 1.0) * BURST_SECONDS
        yield draw.uniform(0.5, 1.5) * work * (1 - BURST_SHARE) / BURST_SHARE, work


def _work(until: float, source: bytearray, target: bytearray) -> None:
    while time.monotonic() < until:
        target[:] = source
        sum(number * number for number in range(20_000))


def _run(kind: str, seed: int) -> NoReturn:
    source, target = bytearray(COPY_BYTES), bytearray(COPY_BYTES)
    begin, parent = time.monotonic(), os.getppid()
    schedule = bursts(seed)
    while os.getppid() == parent:  # ends with the battery, however that ends
        if kind == "bursts":
            rest, work = next(schedule)
        else:
            work = SLICE_SECONDS * wander_share(time.monotonic() - begin, seed)
            rest = SLICE_SECONDS - work
        time.sleep(rest)
        _work(time.monotonic() + work, source, target)
    raise SystemExit


if __name__ == "__main__":
    _run(sys.argv[1], int(sys.argv[2]))
