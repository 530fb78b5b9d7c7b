"""Error rates of the verdicts from recorded sessions: launches drawn again, judged by the code of the gate.

The A/A launches of a battery are the noise: each draw takes as many as the looks need, with replacement, exchanges their
sides at random, and multiplies one side by a known change. Thousands of draws show rates that tens of sessions cannot;
they are rates under the noise of the recorded sessions, whose wander between sessions is mixed in every draw.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from perf.analysis.paired import launch_effects
from perf.analysis.verdicts import Verdict, decide_looks


@dataclass(frozen=True)
class Rates:
    """Shares of the verdicts in simulated comparisons with one true change. launches: mean of those made."""

    change: float
    draws: int
    share: dict[Verdict, float]
    launches: float

    @property
    def alarms(self) -> float:
        """The share of comparisons that report a change."""
        return self.share[Verdict.SLOWER] + self.share[Verdict.FASTER]


def noise_of(sessions: Sequence[dict]) -> list[float]:
    """Log ratios of all A/A launches. Raises ValueError where no session has rounds of both sides."""
    effects = []
    for session in sessions:
        rounds = session["rounds"]
        effects += launch_effects(rounds["aa"], rounds["plain"])
    if not effects:
        raise ValueError("no session has A/A rounds")
    return effects


def simulate(
    noise: Sequence[float], change: float, looks: Sequence[int], margin: float, draws: int, seed: int = 0
) -> Rates:
    """Judge `draws` comparisons of a true change, a fraction, by perf.analysis.verdicts.decide_looks."""
    draw, verdicts, launches = random.Random(f"{seed} {change}"), Counter(), []
    for _ in range(draws):
        effects: list[float] = []
        for look in looks:
            new = (draw.choice(noise) * draw.choice((1, -1)) for _ in range(look - len(effects)))
            effects += [effect + math.log1p(change) for effect in new]
            decision, is_open = decide_looks(effects, margin, looks)
            if not is_open:
                break
        verdicts[decision.verdict] += 1
        launches.append(len(effects))
    share = {verdict: verdicts[verdict] / draws for verdict in Verdict}
    return Rates(change, draws, share, statistics.fmean(launches))


def table(sessions: Sequence[dict], changes: Sequence[float], looks: Sequence[int], margin: float, draws: int) -> str:
    """One line for each true change."""
    noise = noise_of(sessions)
    lines = [
        f"{len(noise)} recorded A/A launches, {draws} draws each, looks after {', '.join(map(str, looks))} launches, "
        f"margin {100 * margin:g} %"
    ]
    for change in changes:
        rates = simulate(noise, change, looks, margin, draws)
        shown = [verdict for verdict in Verdict if rates.share[verdict]]
        parts = [f"{verdict.value} {100 * rates.share[verdict]:.2f} %" for verdict in shown]
        parts += [] if change else [f"false alarms {100 * rates.alarms:.2f} %"]
        lines.append(f"true change {100 * change:+g} %: {', '.join(parts)}; {rates.launches:.1f} launches on average")
    return "\n".join(lines)
