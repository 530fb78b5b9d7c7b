"""Ratio of two series whose rounds alternate within launches: estimator, interval and stopping rule.

Estimator: in each launch the 25 %-trimmed mean of the log ratios of neighbouring rounds, and Student's t over launches.
Neighbouring rounds share the noise of the moment, the trimmed mean discards disturbed pairs, and the launch is the unit
of replication because rounds of one process are not independent (Kalibera and Jones 2013). docs/statistics.md compares it
with medians, Hodges-Lehmann and bootstrap intervals, whose coverage is too low at 8 launches.

Stopping: group-sequential looks after LOOKS launches with a constant nominal level (Pocock 1977), so that the interval of
the last look taken contains the true ratio in 95 % of sessions, however many looks there were. The rounds of a launch
end when they have settled its effect: disturbed launches have more rounds, so that launches differ less in precision.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Sequence

from perf.analysis.statistics import BreakEven, Interval, student_quantile

LOOKS = (8, 12, 16, 24)  # launches
LEVEL = 0.05
# Nominal level of each look: 5.0 % of 200,000 simulated null sessions have an interval without the true ratio at any look.
LOOK_LEVEL = 0.018
TRIM = 0.25  # share of the pairs of a launch left out at each end
ROUNDS, MOST_ROUNDS = 8, 24  # of a launch on a CPU
# Standard error of the effect of a launch at which its rounds end: about the deviation of launches apart from the noise of their
# rounds, 1.3 % on a quiet machine (docs/statistics.md), so that rounds are added only where they are most of the noise.
SETTLED = 0.015
MIN_LAUNCHES = 2
MOST_LAUNCHES = 1000

Rounds = Sequence[Sequence[float | None]]  # seconds, by launch and cycle; None for an invalid round


def launch_effects(head: Rounds, base: Rounds) -> list[float]:
    """Log ratio head / base of each launch with at least one round on both sides.

    Round i of both sides of a launch belongs to the same cycle. Raises ValueError for seconds that are not positive.
    """
    effects = []
    for ours, theirs in zip(head, base):
        pairs = log_ratios(ours, theirs)
        if pairs:
            effects.append(trimmed_mean(pairs))
    return effects


def log_ratios(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float]:
    """Log ratio ours / theirs of each valid cycle of one launch. Raises ValueError for seconds that are not positive."""
    if not all(0 < seconds < math.inf for seconds in (*ours, *theirs) if seconds is not None):
        raise ValueError("durations must be positive and finite")
    return [math.log(a / b) for a, b in _valid(ours, theirs)]


def _valid(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[tuple[float, float]]:
    """Seconds of both sides in each cycle that is valid on both."""
    return [(a, b) for a, b in zip(ours, theirs) if a is not None and b is not None]


def trimmed_mean(values: Sequence[float]) -> float:
    """Mean without the lowest and highest TRIM of the values, rounded down to whole values."""
    cut = int(TRIM * len(values))
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def trimmed_error(values: Sequence[float]) -> float:
    """Standard error of the trimmed mean of at least 2 values, from the winsorised deviation (Yuen 1974)."""
    cut = int(TRIM * len(values))
    kept = sorted(values)[cut : len(values) - cut]
    winsorised = [kept[0]] * cut + kept + [kept[-1]] * cut
    return deviation_of(winsorised) * math.sqrt((len(values) - 1) / (len(kept) * (len(kept) - 1)))


def is_settled(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> bool:
    """Whether the rounds of one launch, in seconds by cycle of both sides of each comparison, are enough.

    They are if the root mean square of the effects' estimated standard errors is at most SETTLED, or without a comparison.
    The mean of all comparisons does not grow with their number, as the largest error would.
    """
    logs = [log_ratios(*sides) for sides in pairs]
    squares = [trimmed_error(each) ** 2 if len(each) > 1 else math.inf for each in logs]
    return not squares or statistics.fmean(squares) <= SETTLED**2


def deviation_of(values: Sequence[float]) -> float:
    """Standard deviation of a sample, in floats: the exact fractions of statistics.stdev would slow simulations tenfold."""
    middle = statistics.fmean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean with its 1 - level interval by Student's t. Raises ValueError for fewer than 2 values."""
    if len(values) < MIN_LAUNCHES:
        raise ValueError(f"needs at least {MIN_LAUNCHES} launches with rounds of both sides: got {len(values)}")
    middle = statistics.fmean(values)
    half = half_width(deviation_of(values), len(values), level)
    return Interval(middle, middle - half, middle + half)


def ratio_of_effects(effects: Sequence[float], level: float = LEVEL) -> Interval:
    """Ratio with its 1 - level interval, from the log ratios of launches. Raises ValueError for fewer than 2."""
    logs = mean_interval(effects, level)
    return Interval(*(math.exp(min(value, 700.0)) for value in (logs.estimate, logs.low, logs.high)))


def paired_ratio(head: Rounds, base: Rounds, level: float = LEVEL) -> Interval:
    """Ratio head / base with its 1 - level confidence interval. Raises ValueError for fewer than 2 paired launches."""
    return ratio_of_effects(launch_effects(head, base), level)


def half_width(deviation: float, launches: int, level: float = LEVEL) -> float:
    """Half the width of the interval of a mean over launches, from their standard deviation."""
    return student_quantile(1 - level / 2, launches - 1) * deviation / math.sqrt(launches)


def detectable(effects: Sequence[float], margin: float, level: float = LEVEL) -> float:
    """The slowdown, as a fraction, whose interval would lie beyond the margin with probability 1/2."""
    half = half_width(deviation_of(effects), len(effects), level)
    return math.exp(min(math.log1p(margin) + half, 700.0)) - 1


def launches_for(effects: Sequence[float], difference: float, margin: float) -> int | None:
    """Launches after which a slowdown of `difference` is detectable by a single look; None for more than MOST_LAUNCHES."""
    deviation = deviation_of(effects)
    reach = math.log1p(difference) - math.log1p(margin)
    counts = range(MIN_LAUNCHES, MOST_LAUNCHES + 1)
    index = bisect.bisect_left(counts, True, key=lambda count: half_width(deviation, count) <= reach)
    return counts[index] if index < len(counts) else None


def is_futile(effects: Sequence[float], margin: float, looks: Sequence[int]) -> bool:
    """Whether even the last look could hardly give a verdict, so that more launches would be spent for nothing.

    The estimate of the last look is assumed within a standard error of what the remaining launches add to the present one,
    and its interval a quarter narrower than the present deviation predicts.
    """
    count, last = len(effects), looks[-1]
    estimate, deviation = abs(statistics.fmean(effects)), deviation_of(effects)
    change = deviation * math.sqrt(max(0.0, 1 / count - 1 / last))
    half = half_width(0.75 * deviation, last, LOOK_LEVEL)
    never_same = max(0.0, estimate - change) + half > math.log1p(2 * margin)
    never_changed = estimate + change - half < math.log1p(margin)
    return never_same and never_changed


def break_even(compile_seconds: float, eager: Rounds, compiled: Rounds) -> BreakEven:
    """The number of images after which compiling pays off, from seconds per image of alternating rounds.

    The saving of a launch is the trimmed mean of its paired differences, with Student's t over launches. If the interval
    includes 0, the estimate is None (never) and `low` is the count at the interval's upper bound. Raises ValueError for
    fewer than 2 paired launches, durations that are not positive, and negative `compile_seconds`.
    """
    if not 0 <= compile_seconds < math.inf:
        raise ValueError(f"compiling cannot take {compile_seconds} seconds")
    launch_effects(eager, compiled)  # rejects impossible durations
    launches = ([a - b for a, b in _valid(ours, theirs)] for ours, theirs in zip(eager, compiled))
    saving = mean_interval([trimmed_mean(differences) for differences in launches if differences])

    def images(seconds: float) -> int | None:
        return math.ceil(compile_seconds / seconds) if seconds > 0 else None

    return BreakEven(images(saving.estimate) if saving.low > 0 else None, images(saving.high), images(saving.low))
