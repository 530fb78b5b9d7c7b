"""Intervals of measured ratios, and what is known about the machine's own noise. Pure: the standard library only.

A ratio is always new / old in seconds, so that more than 1 means slower. Logarithms make x 2 and / 2 equally far from 1.
The unit of replication is the launch: rounds of one process share what its start has drawn, and more of them make an
interval narrower without making it right.
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
CONFIDENCE = 0.95
MIN_VALUES = 6  # of 5 values no two order statistics enclose the median with 95 % confidence: 1 - 2 / 2^5 is 93.75 %
MIN_SESSIONS = 6
MARGIN_FLOOR = 0.01  # a change under 1 % is never called one, however quiet the machine


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its 95 % confidence interval; bounds of 0 and infinity mean that none are known."""

    estimate: float
    low: float
    high: float

    @classmethod
    def point(cls, estimate: float) -> Interval:
        """A ratio about whose uncertainty the data say nothing."""
        return cls(estimate, 0.0, math.inf)

    @property
    def bounded(self) -> bool:
        """False where only the estimate is known."""
        return self.high < math.inf

    def as_dict(self) -> dict[str, float | None]:
        """Ready for JSON, which has no infinity: unknown bounds are null."""
        low, high = (self.low, self.high) if self.bounded else (None, None)
        return {"estimate": self.estimate, "low": low, "high": high}

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]" if self.bounded else f"{self.estimate:.3f}"


@dataclass(frozen=True)
class BreakEven:
    """After how many images compiling has paid, with its 95 % interval; None stands for never."""

    estimate: int | None
    low: int | None
    high: int | None

    def as_dict(self) -> dict[str, int | None]:
        """Ready for JSON."""
        return {"estimate": self.estimate, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class SelfComparison:
    """What identical configurations looked like when compared (A/A): the machine's own noise, as ratios."""

    ratios: tuple[float, ...]
    p95: float

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {"comparisons": len(self.ratios), "p95": self.p95, "ratios": list(self.ratios)}


def _require_durations(*series: Sequence[float]) -> None:
    if not all(0 < value < math.inf for values in series for value in values):
        raise ValueError("durations must be positive and finite")


def _percentile_interval(estimate: float, resampled: list[float]) -> Interval:
    resampled.sort()
    bound = round((1 - CONFIDENCE) / 2 * len(resampled))
    return Interval(estimate, resampled[bound], resampled[-bound - 1])


def _bootstrap_median(values: Sequence[float], seed: int | str) -> Interval:
    draw = random.Random(seed)
    medians = [statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    return _percentile_interval(statistics.median(values), medians)


def _exponential(logs: Interval) -> Interval:
    return Interval(math.exp(logs.estimate), math.exp(logs.low), math.exp(logs.high))


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int | str = 0) -> Interval:
    """How many times larger the first series is, from values measured in pairs: bootstrap of the median log ratio.

    The bootstrap is the percentile one (Efron 1979); `seed` makes it repeat, so name it after the pair. Of 10 values its
    true confidence is about 94 % (simulated, with outliers); `sign_interval` of the ratios is exact, and a little wider.
    Raises ValueError for series of different or too small length, or with values that are not positive.
    """
    if len(numerators) != len(denominators) or len(numerators) < MIN_VALUES:
        raise ValueError(
            f"needs two series of one length, at least {MIN_VALUES}: got {len(numerators)} and {len(denominators)}"
        )
    _require_durations(numerators, denominators)
    return _exponential(_bootstrap_median([math.log(a / b) for a, b in zip(numerators, denominators)], seed))


def unpaired_ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int | str = 0) -> Interval:
    """How many times larger the median of the first series is, from two independent series; percentile bootstrap.

    Of two sessions this is the interval of what these two did, without the offset that a third session would have:
    no verdict may rest on it. Raises ValueError for fewer than 6 values, or values that are not positive.
    """
    if min(len(numerators), len(denominators)) < MIN_VALUES:
        raise ValueError(f"needs at least {MIN_VALUES} values each: got {len(numerators)} and {len(denominators)}")
    _require_durations(numerators, denominators)
    draw = random.Random(seed)
    above, below = [math.log(value) for value in numerators], [math.log(value) for value in denominators]
    differences = [
        statistics.median(draw.choices(above, k=len(above))) - statistics.median(draw.choices(below, k=len(below)))
        for _ in range(RESAMPLES)
    ]
    return _exponential(_percentile_interval(statistics.median(above) - statistics.median(below), differences))


def sign_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Median of `values`, in their unit, with the exact distribution-free interval of the sign test (two of the values).

    Nothing is drawn at random and nothing assumed but independence; the true confidence is at least `confidence`:
    96.9 % for 6 values, 97.9 % for 10, 95.9 % for 20. Raises ValueError where no two values reach it (5 and fewer at 95 %).
    """
    n = len(values)
    tail = int((1 - confidence) / 2 * 2**53) * 2**n >> 53  # in whole numbers, since 2^n passes the largest float
    outside, rank = (
        1,
        -1,
    )  # `outside` of the 2^n equally likely sign patterns leave the median below value number `rank`
    while outside <= tail and rank + 1 < n // 2:
        rank += 1
        outside += math.comb(n, rank + 1)
    if rank < 0:
        raise ValueError(f"{n} values are too few for an interval of the median with {confidence:.0%} confidence")
    ordered = sorted(values)
    return Interval(statistics.median(ordered), ordered[rank], ordered[n - 1 - rank])


def _student_probability(angle: float, degrees: int) -> float:
    """P(|t| < sqrt(degrees) * tan(angle)) of Student's t: the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    if degrees == 1:
        return 2 * angle / math.pi
    odd = degrees % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, degrees, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@lru_cache(maxsize=256)
def student_quantile(probability: float, degrees: int) -> float:
    """The t below which Student's distribution with `degrees` whole degrees of freedom has `probability` (Student 1908).

    Solved by bisection of the exact series, to about 1e-12 of the angle. Raises ValueError outside 0 < probability < 1
    or under 1 degree.
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
    """A new session's value over the geometric mean of stored sessions, with Student's prediction interval for one more.

    With `base`, one session's value, it is the ratio to that session, which has a session's own offset as well.

    The values are one per session, each divided by the frozen anchor's seconds of its own session. The interval holds 1
    in `confidence` of sessions in which nothing has changed, whatever sessions differ in. Raises ValueError for fewer than
    6 sessions or values that are not positive.
    """
    if len(history) < MIN_SESSIONS:
        raise ValueError(f"needs at least {MIN_SESSIONS} stored sessions: got {len(history)}")
    _require_durations([current], history, [] if base is None else [base])
    logs = [math.log(value) for value in history]
    middle, offsets = (statistics.fmean(logs), 1 + 1 / len(logs)) if base is None else (math.log(base), 2.0)
    gap = math.log(current) - middle
    quantile = student_quantile((1 + confidence) / 2, len(logs) - 1)
    half = quantile * statistics.stdev(logs) * math.sqrt(offsets)
    return _exponential(Interval(gap, gap - half, gap + half))


def drift(seconds: Sequence[float], parts: int = 3) -> float:
    """How far the frozen anchor moved within a session, as a fraction: the part whose median is farthest from all's.

    The series, in the order of measuring, is cut into `parts` runs of nearly equal length; medians keep a single
    disturbed round from looking like drift. Raises ValueError for fewer than 2 values a part.
    """
    if len(seconds) < 2 * parts:
        raise ValueError(f"needs at least {2 * parts} values: got {len(seconds)}")
    _require_durations(seconds)
    cuts = [len(seconds) * part // parts for part in range(parts + 1)]
    overall = statistics.median(seconds)
    return max(abs(statistics.median(seconds[a:b]) / overall - 1) for a, b in itertools.pairwise(cuts))


def self_comparison(ratios: Sequence[float]) -> SelfComparison:
    """Summary of A/A ratios; `p95` is the 95th percentile of |ratio - 1| by nearest rank, which for few is the largest."""
    if not ratios:
        raise ValueError("needs at least one A/A ratio")
    _require_durations(ratios)
    deviations = sorted(abs(ratio - 1) for ratio in ratios)
    return SelfComparison(tuple(ratios), deviations[math.ceil(0.95 * len(deviations)) - 1])


def margin(aa_ratios: Sequence[float] = ()) -> float:
    """The change, as a fraction, up to which this machine cannot be trusted: 1 %, or p95 of its A/A ratios if more."""
    return max(MARGIN_FLOOR, self_comparison(aa_ratios).p95) if aa_ratios else MARGIN_FLOOR


def break_even(
    compile_seconds: float, eager: Sequence[float], compiled: Sequence[float], seed: int | str = 0
) -> BreakEven:
    """Images after which `compile_seconds` of compiling have been won back, from seconds per image measured in pairs.

    The saving per image is the median difference with its bootstrap interval. Where that includes 0 compiling has not
    been shown to pay, and the estimate is never; `low` then is the count in the best case that the interval allows.
    Raises ValueError as `paired_ratio` does, or for negative `compile_seconds`.
    """
    if len(eager) != len(compiled) or len(eager) < MIN_VALUES:
        raise ValueError(f"needs two series of one length, at least {MIN_VALUES}: got {len(eager)} and {len(compiled)}")
    _require_durations(eager, compiled)
    if not 0 <= compile_seconds < math.inf:
        raise ValueError(f"compiling cannot take {compile_seconds} seconds")
    saving = _bootstrap_median([a - b for a, b in zip(eager, compiled)], seed)

    def images(seconds: float) -> int | None:
        return math.ceil(compile_seconds / seconds) if seconds > 0 else None

    return BreakEven(images(saving.estimate) if saving.low > 0 else None, images(saving.high), images(saving.low))
