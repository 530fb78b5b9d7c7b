"""A value over launches with its interval: one statistic for times, stages and energy. Pure: the standard library only."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from perf.analysis.statistics import MIN_VALUES, sign_interval


@dataclass(frozen=True)
class Spread:
    """The median launch with the bounds of its interval, in the unit of the rounds. name: what the bounds are.

    low and high are None where only the value was saved.
    """

    value: float
    low: float | None
    high: float | None
    name: str

    def over(self, count: float) -> Spread:
        """The same for a part of it: of a round's seconds those of an image."""
        low, high = (None if bound is None else bound / count for bound in (self.low, self.high))
        return Spread(self.value / count, low, high, self.name)


def over_launches(launches: Sequence[Sequence[float]]) -> Spread:
    """Of the rounds of each launch, of which at least one has some.

    The exact 95 % interval of the median launch, or from under 6 launches, of which there is none, the range of the rounds.
    """
    medians = [statistics.median(rounds) for rounds in launches if rounds]
    if len(medians) < MIN_VALUES:
        rounds = [value for launch in launches for value in launch]
        words = f"range of the rounds of {len(medians)} launch{'es' if len(medians) > 1 else ''}"
        return Spread(statistics.median(medians), min(rounds), max(rounds), words)
    found = sign_interval(medians)
    return Spread(found.estimate, found.low, found.high, "95 % interval")


def value_alone(value: float, why: str) -> Spread:
    """A value without an interval; `why` stands in its place."""
    return Spread(value, None, None, why)
