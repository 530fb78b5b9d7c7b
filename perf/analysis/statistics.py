"""Confidence intervals of measured ratios, and the machine's own noise. Pure: the standard library only.

A ratio is new / old in seconds, so that more than 1 means slower; in logarithms x 2 and / 2 are equally far from 1.
The unit of replication is the launch: rounds of one process share its initial state, so that more of them narrow an
interval without making it more accurate.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

RESAMPLES = 9_999
DRIFT_RESAMPLES = 1_999
CONFIDENCE = 0.95
MIN_VALUES = 6  # the range of 5 values encloses the median with 1 - 2 / 2^5 = 93.75 % confidence only
MIN_SESSIONS = 6
MARGIN_FLOOR = 0.01  # smaller changes are not reported, however quiet the machine


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval; bounds of 0 and infinity stand for unknown."""

    estimate: float
    low: float
    high: float

    @classmethod
    def point(cls, estimate: float) -> Interval:
        """A ratio of unknown uncertainty."""
        return cls(estimate, 0.0, math.inf)

    @property
    def bounded(self) -> bool:
        """Whether the bounds are known."""
        return self.high < math.inf

    def as_dict(self) -> dict[str, float | None]:
        """The interval as JSON types; unknown bounds are null, since JSON has no infinity."""
        low, high = (self.low, self.high) if self.bounded else (None, None)
        return {"estimate": self.estimate, "low": low, "high": high}

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]" if self.bounded else f"{self.estimate:.3f}"


@dataclass(frozen=True)
class BreakEven:
    """The number of images after which compiling pays off, with its 95 % interval; None stands for never."""

    estimate: int | None
    low: int | None
    high: int | None

    def as_dict(self) -> dict[str, int | None]:
        """The fields as JSON types."""
        return {"estimate": self.estimate, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class SelfComparison:
    """Ratios of identical configurations (A/A): the machine's own noise. p95: 95th percentile of |ratio - 1|."""

    ratios: tuple[float, ...]
    p95: float

    def as_dict(self) -> dict[str, object]:
        """The fields as JSON types."""
        return {"comparisons": len(self.ratios), "p95": self.p95, "ratios": list(self.ratios)}


def _require_durations(*series: Sequence[float]) -> None:
    if not all(0 < value < math.inf for values in series for value in values):
        raise ValueError("durations must be positive and finite")


def _percentile_interval(estimate: float, resampled: list[float]) -> Interval:
    resampled.sort()
    bound = round((1 - CONFIDENCE) / 2 * len(resampled))
    return Interval(estimate, resampled[bound], resampled[-bound - 1])


def _exponential(logs: Interval) -> Interval:
    return Interval(math.exp(logs.estimate), math.exp(logs.low), math.exp(logs.high))


def unpaired_ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int | str = 0) -> Interval:
    """The ratio of the medians of two independent series: percentile bootstrap.

    For two sessions the interval excludes the variation between sessions, so that no verdict may rest on it. Raises
    ValueError for fewer than 6 values, and for values that are not positive.
    """
    if min(len(numerators), len(denominators)) < MIN_VALUES:
        raise ValueError(f"needs at least {MIN_VALUES} values each: got {len(numerators)} and {len(denominators)}")
    _require_durations(numerators, denominators)
    draw = random.Random(seed)
    above, below = [math.log(value) for value in numerators], [math.log(value) for value in denominators]

    def resampled_median(values: list[float]) -> float:
        return statistics.median(draw.choices(values, k=len(values)))

    differences = [resampled_median(above) - resampled_median(below) for _ in range(RESAMPLES)]
    return _exponential(_percentile_interval(statistics.median(above) - statistics.median(below), differences))


def sign_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The median with the exact distribution-free interval of the sign test, whose bounds are two of the values.

    Deterministic; assumes only independence. The true confidence is at least `confidence`: 96.9 % for 6 values, 97.9 %
    for 10, 95.9 % for 20. Raises ValueError if no interval reaches it (5 and fewer values at 95 %).
    """
    n = len(values)
    tail = int((1 - confidence) / 2 * 2**53) * 2**n >> 53  # in integers, since 2^n exceeds the largest float
    outside, rank = (
        1,
        -1,
    )  # in `outside` of the 2^n equally likely sign patterns the median is below value number `rank`
    while outside <= tail and rank + 1 < n // 2:
        rank += 1
        outside += math.comb(n, rank + 1)
    if rank < 0:
        raise ValueError(f"{n} values are too few for an interval of the median with {confidence:.0%} confidence")
    ordered = sorted(values)
    return Interval(statistics.median(ordered), ordered[rank], ordered[n - 1 - rank])


def _student_probability(angle: float, degrees: int) -> float:
    """P(|t| < sqrt(degrees) * tan(angle)) of Student's t, by the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    if degrees == 1:
        return 2 * angle / math.pi
    odd = degrees % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, degrees, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@lru_cache(maxsize=4096)
def student_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution with `degrees` integer degrees of freedom (Student 1908).

    Solved by bisection of the exact series, to about 1e-12 of the angle. Raises ValueError unless 0 < probability < 1
    and degrees >= 1.
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"needs 0 < probability < 1 and at least 1 degree of freedom: got {probability}, {degrees}")
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _student_probability(middle, degrees) < abs(2 * probability - 1):
            low = middle
        else:
            high = middle
    return math.copysign(math.sqrt(degrees) * math.tan(low), probability - 0.5)


def prediction_ratio(
    current: float, history: Sequence[float], confidence: float = CONFIDENCE, base: float | None = None
) -> Interval:
    """The ratio of a new session to the geometric mean of stored ones, with Student's prediction interval.

    Each session has one value: its median divided by the reference workload's seconds in the same session. With `base`,
    the value of one session, the ratio is to that session, whose own offset then widens the interval. For unchanged
    code the interval includes 1 in `confidence` of sessions. Raises ValueError for fewer than 6 sessions and for values
    that are not positive.
    """
    if len(history) < MIN_SESSIONS:
        raise ValueError(f"needs at least {MIN_SESSIONS} stored sessions: got {len(history)}")
    _require_durations([current], history, [] if base is None else [base])
    logs = [math.log(value) for value in history]
    middle = statistics.fmean(logs) if base is None else math.log(base)
    gap = math.log(current) - middle
    half = prediction_half_width(history, len(logs), base is not None, confidence)
    return _exponential(Interval(gap, gap - half, gap + half))


def prediction_half_width(
    history: Sequence[float], count: int, named: bool = False, confidence: float = CONFIDENCE
) -> float:
    """Half the width, in logs, of the prediction interval from `count` sessions with the spread of `history`.

    named: the ratio is to one session instead of their mean.
    """
    quantile = student_quantile((1 + confidence) / 2, count - 1)
    return quantile * statistics.stdev(map(math.log, history)) * math.sqrt(2.0 if named else 1 + 1 / count)


def drift(seconds: Sequence[float], parts: int = 3) -> float:
    """The drift of the reference workload within a session: the largest deviation of a part's median, as a fraction.

    The series, in measuring order, is cut into `parts` of nearly equal length; medians are robust to single disturbed
    rounds. Raises ValueError for fewer than 2 values a part.
    """
    if len(seconds) < 2 * parts:
        raise ValueError(f"needs at least {2 * parts} values: got {len(seconds)}")
    _require_durations(seconds)
    cuts = [len(seconds) * part // parts for part in range(parts + 1)]
    overall = statistics.median(seconds)
    return max(abs(statistics.median(seconds[a:b]) / overall - 1) for a, b in itertools.pairwise(cuts))


def least_drift(launches: Sequence[Sequence[float]], parts: int = 3) -> float | None:
    """The lower bound of the drift with 95 % confidence, at least 0: percentile bootstrap over launches.

    launches: seconds of the reference workload by launch, in measuring order. Whole launches are drawn again within each
    part of the session, since rounds of one launch share the state of the machine. The median of the drawn drifts is
    larger than the drift that was observed, because the deviation of a part is an absolute value; the bound is corrected
    by that difference (basic bootstrap, Davison and Hinkley 1997). None for fewer than 2 launches a part.
    """
    if len(launches) < 2 * parts:
        return None
    medians = [statistics.median(launch) for launch in launches]
    _require_durations(medians)
    cuts = [len(medians) * part // parts for part in range(parts + 1)]
    sections = [medians[a:b] for a, b in itertools.pairwise(cuts)]

    def deviation(sections: Sequence[Sequence[float]]) -> float:
        overall = statistics.median(itertools.chain.from_iterable(sections))
        return max(abs(statistics.median(section) / overall - 1) for section in sections)

    draw = random.Random("drift")
    drawn = [deviation([draw.choices(section, k=len(section)) for section in sections]) for _ in range(DRIFT_RESAMPLES)]
    drawn.sort()
    highest = drawn[-round((1 - CONFIDENCE) / 2 * DRIFT_RESAMPLES) - 1]
    return max(0.0, 2 * deviation(sections) - highest)


def launch_interval(seconds: Sequence[float]) -> Interval:
    """The median of the launches' seconds with its 95 % interval. Raises ValueError for fewer than 2 launches.

    From 6 launches on the exact interval of the median; below, where none exists, Student's t of the logarithms (of the
    values where one is not positive, as the rest of a GPU round), widened to include the median.
    """
    if len(seconds) >= MIN_VALUES:
        return sign_interval(seconds)
    if len(seconds) < 2:
        raise ValueError(f"needs at least 2 launches: got {len(seconds)}")
    median, positive = statistics.median(seconds), all(value > 0 for value in seconds)
    values = [math.log(value) if positive else value for value in seconds]
    half = student_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    low, high = statistics.fmean(values) - half, statistics.fmean(values) + half
    if positive:
        low, high = math.exp(low), math.exp(min(high, 700.0))
    return Interval(median, min(median, low), max(median, high))


def self_comparison(ratios: Sequence[float]) -> SelfComparison:
    """Summarise A/A ratios; the percentile is by nearest rank. Raises ValueError without ratios."""
    if not ratios:
        raise ValueError("needs at least one A/A ratio")
    _require_durations(ratios)
    deviations = sorted(abs(ratio - 1) for ratio in ratios)
    return SelfComparison(tuple(ratios), deviations[math.ceil(0.95 * len(deviations)) - 1])


def margin(aa_ratios: Sequence[float] = ()) -> float:
    """The smallest change that this machine can resolve, as a fraction: 1 %, or the p95 of its A/A ratios if larger."""
    return max(MARGIN_FLOOR, self_comparison(aa_ratios).p95) if aa_ratios else MARGIN_FLOOR
