"""Intervals of measured ratios. Pure: the standard library only."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass

RESAMPLES = 9_999


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its 95 % confidence interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_ratio(numerators, denominators, seed: int | str = 0) -> Interval:
    """How many times larger the first series is, from rounds measured in pairs: bootstrap of the median log ratio.

    The bootstrap is the percentile one (Efron 1979); `seed` makes it repeat, so name it after the pair.
    Raises ValueError for series of different or too small length, or with values that are not positive.
    """
    if len(numerators) != len(denominators) or len(numerators) < 6:
        raise ValueError(f"needs two series of one length, at least 6: got {len(numerators)} and {len(denominators)}")
    if not all(0 < value < math.inf for value in (*numerators, *denominators)):
        raise ValueError("durations must be positive and finite")
    logs = [math.log(a / b) for a, b in zip(numerators, denominators)]
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(logs, k=len(logs))) for _ in range(RESAMPLES))
    bound = round(0.025 * RESAMPLES)
    return Interval(math.exp(statistics.median(logs)), math.exp(medians[bound]), math.exp(medians[-bound - 1]))
