"""A value over launches with its interval: one statistic for times, stages and energy."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from perf.analysis.statistics import launch_interval
from perf.report.text import interval_seconds

MIN_LAUNCHES = 3  # of two launches Student's interval is 13 standard deviations wide to each side


@dataclass(frozen=True)
class Estimate:
    """A median over launches with its interval, in the unit of the rounds. name: the kind of interval, or why there is none.

    low and high are None if only the value was saved.
    """

    value: float
    low: float | None
    high: float | None
    name: str

    @classmethod
    def over_launches(cls, launches: Sequence[Sequence[float]]) -> Estimate:
        """Median launch with its 95 % interval, or below MIN_LAUNCHES with the range of the rounds.

        launches: values of the rounds of each launch, at least one of them not empty.
        """
        medians = [statistics.median(rounds) for rounds in launches if rounds]
        if len(medians) < MIN_LAUNCHES:
            rounds = list(itertools.chain.from_iterable(launches))
            name = f"range of the rounds of {len(medians)} launch{'es' if len(medians) > 1 else ''}"
            return cls(statistics.median(medians), min(rounds), max(rounds), name)
        interval = launch_interval(medians)
        return cls(interval.estimate, interval.low, interval.high, "95 % interval")

    def per(self, count: float) -> Estimate:
        """The estimate divided by a count, such as seconds of a round by its images."""
        low, high = (None if bound is None else bound / count for bound in (self.low, self.high))
        return Estimate(self.value / count, low, high, self.name)

    def seconds(self) -> str:
        """The estimate as a time with a unit and, if known, its interval."""
        return interval_seconds(max(0.0, self.value), self.low, self.high)
