"""The rule by which slots are loaded together: all, the variants of one configuration, or one at a time.

Rounds of slots that are loaded together alternate, so that momentary noise affects all of them alike; only one runs a
round at a time. The rule compares an estimate of the memory of all workers with the memory that is free when the session starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from perf.configurations.configuration import EMBEDDED, NATIVE_PIXELS, Configuration
from perf.machine.facts import CpuFacts
from perf.session.plan import Loading, Plan, Slot

GIB = 1 << 30
FREE_SHARE = 0.8  # of the free memory that workers may fill
# Memory of a worker in GiB: of the process with its weights and libraries, and of each image of its batch. Upper bounds in
# fp32 with the `original` attention at these pixels; the images of other sizes are scaled by the square of their pixels,
# since that attention stores all pairs of them.
EMBEDDED_GIB, EMBEDDED_PIXELS = (0.6, 0.1), 64
FULL_SIZE_GIB, FULL_SIZE_PIXELS = (7.0, 4.0), 512


def worker_bytes(configuration: Configuration) -> int:
    """An upper estimate of the memory of a worker with this configuration."""
    embedded = configuration.model in EMBEDDED
    (base, image), side = (EMBEDDED_GIB, EMBEDDED_PIXELS) if embedded else (FULL_SIZE_GIB, FULL_SIZE_PIXELS)
    native = NATIVE_PIXELS.get(configuration.model, side)
    pixels = (configuration.height or native) * (configuration.width or native)
    scale = max(1.0, (pixels / side**2) ** 2)
    return int((base + image * scale * configuration.batch) * GIB)


def at_once(threads: int | None, cpu: CpuFacts) -> int:
    """How many workers load at the same time: as many as there are CPUs for their threads, where None means all of them."""
    cpus = min(float(cpu.cores or 1), cpu.cgroup_cpus or math.inf)
    return max(1, int(cpus / threads)) if threads else 1


def choose(slots: Sequence[Slot], free_bytes: int | None, what: str) -> tuple[Loading, str]:
    """(which slots are loaded together, a line about the reason). free_bytes: None if unknown; what: of which memory."""
    plans: tuple[Loading, ...] = ("all", "variants")
    allowed = None if free_bytes is None else FREE_SHARE * free_bytes
    for loading in plans if allowed is not None else ():
        groups = Plan(tuple(slots), 1, 1, loading).groups()
        needed = max(sum(worker_bytes(slot.configuration) for slot in group) for group in groups)
        if needed <= allowed and any(len(group) > 1 for group in groups):
            return loading, f"{DESCRIPTIONS[loading]}: they need up to {_gib(needed)} of {_gib(free_bytes)} free {what}"
    if len(slots) == 1:
        return "single", ""
    known = "its free size is unknown" if allowed is None else f"{_gib(free_bytes)} are free"
    return "single", f"{DESCRIPTIONS['single']}, since {what} may not hold more: {known}; intervals are wider"


DESCRIPTIONS: dict[Loading, str] = {
    "all": "all configurations are loaded together, and their rounds alternate",
    "variants": "the two sides of a configuration are loaded together, and their rounds alternate",
    "single": "configurations take turns launch by launch",
}


def _gib(count: float | None) -> str:
    return f"{(count or 0) / GIB:.1f} GiB"
