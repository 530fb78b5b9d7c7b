"""The differences that a session can be expected to show, from the load of the machine before it starts."""

from __future__ import annotations

import math

from perf.analysis.paired import LEVEL, LOOK_LEVEL, half_width
from perf.machine.facts import CpuFacts
from perf.session.settings import Settings

QUIET_LOAD_PER_CORE = 0.25
# Standard deviation of the log ratio of one launch of 8 rounds, two identical configurations side by side, embedded model: of
# perf/baselines/battery_idle.json, and beside load that wanders, on another machine, of battery_wander_noisy.json.
QUIET_DEVIATION = 0.028
LOADED_DEVIATION = 0.058


def expectation(cpu: CpuFacts, settings: Settings) -> str:
    """One line: the load now, and the difference between two configurations below which nothing will be visible.

    A pair is SLOWER only beyond the margin, at the level of the looks; a speed-up is visible where its interval lies beyond 1.
    """
    load, cores, launches = cpu.load_average_1_minute, cpu.cores, settings.launches
    if load is None or not cores:
        return "perf: the load of this machine is unreadable: noise is unknown"
    loaded = load > QUIET_LOAD_PER_CORE * cores
    state = f"perf: load {load:.1f} on {cores} core{'s' if cores > 1 else ''}"
    if launches < 2:
        return f"{state}: one launch has no interval, so no difference is certain"
    level, margin = (LOOK_LEVEL if len(settings.looks) > 1 else LEVEL), settings.margin if settings.variant else 0.0
    half = half_width(LOADED_DEVIATION if loaded else QUIET_DEVIATION, launches, level)
    visible = 100 * math.expm1(math.log1p(margin) + half)
    advice = "; end other processes for a closer look" if loaded else ""
    return f"{state}: after {launches} launches, differences under about {visible:.0f} % will not be visible{advice}"
