"""The rule by which slots are loaded together: all, the variants of one configuration, or one at a time.

Rounds of slots that are loaded together alternate, so that momentary noise affects all of them alike; only one runs a
round at a time. The rule compares an estimate of the memory of all workers with the memory that is free when the session starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from perf.configurations.configuration import Configuration
from perf.machine.facts import CpuFacts
from perf.session.plan import Loading, Plan, Slot

GIB = 1 << 30
FREE_SHARE = 0.8  # of the free memory that workers may fill
# Memory of a worker in GiB: of the process with its weights and libraries, and of each image of its batch. Upper bounds in
# fp32 with the `original` attention at 512 x 512; the images of other sizes are scaled by the square of their pixels,
# since that attention stores all pairs of them.
WORKER_GIB = {"tiny": (0.6, 0.1)}
FULL_SIZE_GIB = (7.0, 4.0)
USUAL_PIXELS = {"tiny": 64 * 64}
FULL_SIZE_PIXELS = 512 * 512


def worker_bytes(configuration: Configuration) -> int:
    """An upper estimate of the memory of a worker with this configuration."""
    base, image = WORKER_GIB.get(configuration.model, FULL_SIZE_GIB)
    usual = USUAL_PIXELS.get(configuration.model, FULL_SIZE_PIXELS)
    height, width = configuration.height, configuration.width
    scale = max(1.0, (height * width / usual) ** 2) if height and width else 1.0
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
