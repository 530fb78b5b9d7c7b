"""Slower, faster, the same, or not known: the rules, their reason codes and the exit codes. Pure: no torch, no pytest."""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from perf.analysis.statistics import (
    MIN_SESSIONS,
    MIN_VALUES,
    Interval,
    paired_ratio,
    prediction_ratio,
    unpaired_ratio,
)

# Every reason that a verdict can have. A code may be followed by a detail, such as `anchor_drift 4.1 %`.
REASONS = {
    "beyond_margin": "the change is larger than the margin, and its interval says that it is no accident",
    "within_margin": "the whole interval lies within twice the margin of no change",
    "straddles_margin": "there may be a change of about the margin: neither inside nor outside it for certain",
    "interval_too_wide": "the interval is wider than four margins: measure more launches, or a quieter machine",
    "too_few_rounds": "fewer than 6 pairs of launches: no 95 % interval of a median exists",
    "too_few_sessions": "fewer than 6 stored sessions: how much sessions differ without a change is not known yet",
    "no_baseline": "nothing is stored to compare with",
    "no_anchor": "one side has no anchor beside its rounds, or another anchor, so that sessions cannot be compared",
    "other_configuration": "what is stored under this id did other work",
    "foreign_machine": "measured on another device or software stack: a difference says nothing about the code",
    "wrong_image": "the picture of a timed round failed the image check: a wrong picture has no time",
    "anchor_drift": "the frozen anchor moved within the session: so did everything else",
    "invalid_rounds": "too many rounds were throttled or shared the device",
    "invalid_session": "the session says itself that it cannot be trusted",
    "invalid_baseline": "the baseline says itself that it cannot be trusted",
}


class Verdict(enum.Enum):
    """What is known about a configuration's speed; the same words in terminal, JSON, JUnit and report."""

    SLOWER = "SLOWER"
    FASTER = "FASTER"
    SAME = "SAME"
    INCONCLUSIVE = "INCONCLUSIVE"
    INVALID = "INVALID"


class ExitCode(enum.IntEnum):
    """Exit statuses of everything that judges."""

    OK = 0
    FAILED = 1  # a test or an image check failed, or something could not be measured
    REFUSED = 4  # usage error, unreadable or foreign baseline
    SLOWER = 20  # and nothing else is wrong
    INCONCLUSIVE = 21  # only where asked to be strict


@dataclass(frozen=True)
class Decision:
    """A verdict with what it rests on: ratio (new / old seconds, anchored where sessions differ), margin as a fraction.

    `reason` begins with a code of REASONS, else ValueError; `against` names the baseline.
    """

    verdict: Verdict
    reason: str
    ratio: Interval | None = None
    margin: float | None = None
    against: str | None = None

    def __post_init__(self) -> None:
        if self.code not in REASONS:
            raise ValueError(f"unknown reason {self.reason!r}; known: {', '.join(REASONS)}")

    @property
    def code(self) -> str:
        """The reason without its detail."""
        return self.reason.partition(" ")[0]

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON, as a saved run has it under `verdict`."""
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "ratio": self.ratio.as_dict() if self.ratio else None,
            "margin": self.margin,
            "against": self.against,
        }

    def __str__(self) -> str:
        """Such as `SLOWER +6.2 % [4.9, 7.7] against 0007_nightly (beyond_margin)`."""
        words = [self.verdict.value]
        if self.ratio:
            words.append(f"{percent(self.ratio.estimate):+.1f} %")
            if self.ratio.bounded:
                words.append(f"[{percent(self.ratio.low):.1f}, {percent(self.ratio.high):.1f}]")
        if self.against:
            words.append(f"against {self.against}")
        return " ".join([*words, f"({self.reason})"])


def percent(ratio: float) -> float:
    """A ratio as a change in percent; rounded to a tenth, and never -0.0."""
    return round(100 * (ratio - 1), 1) + 0.0


def _require_margin(margin: float) -> None:
    if not 0 < margin < math.inf:
        raise ValueError(f"the margin is a positive fraction such as 0.01, not {margin}")


def _undecided(ratio: Interval, margin: float, against: str | None) -> Decision:
    """SAME where the interval leaves no room for more than twice the margin, else INCONCLUSIVE with the reason."""
    if 1 - 2 * margin <= ratio.low and ratio.high <= 1 + 2 * margin:
        return Decision(Verdict.SAME, "within_margin", ratio, margin, against)
    reason = "interval_too_wide" if ratio.high - ratio.low > 4 * margin else "straddles_margin"
    return Decision(Verdict.INCONCLUSIVE, reason, ratio, margin, against)


def decide_interval(ratio: Interval, margin: float, against: str | None = None) -> Decision:
    """The rule within one session: SLOWER or FASTER if the whole interval lies beyond the margin.

    Margin and interval together, as criterion.rs has them: an interval alone finds differences too small to matter,
    a threshold alone calls noise a change.
    """
    _require_margin(margin)
    if ratio.low > 1 + margin:
        return Decision(Verdict.SLOWER, "beyond_margin", ratio, margin, against)
    if ratio.high < 1 - margin:
        return Decision(Verdict.FASTER, "beyond_margin", ratio, margin, against)
    return _undecided(ratio, margin, against)


def decide_paired(
    head: Sequence[float], base: Sequence[float], margin: float, seed: int | str = 0, against: str | None = None
) -> Decision:
    """Judge two series of one interleave, in seconds, one value per launch; value i of both was measured side by side.

    `seed` of the bootstrap is best made of the two names, so that judging again gives the same. Fewer than 6 pairs are
    INCONCLUSIVE; raises ValueError for series of different lengths, values that are not positive, or an impossible margin.
    """
    _require_margin(margin)
    if len(head) == len(base) < MIN_VALUES:
        return Decision(Verdict.INCONCLUSIVE, "too_few_rounds", None, margin, against)
    return decide_interval(paired_ratio(head, base, seed), margin, against)


def decide_against_history(
    current: float, history: Sequence[float], margin: float, against: str | None = None, base: float | None = None
) -> Decision:
    """Judge a new session's anchored median against those of stored sessions, oldest first.

    With `base` the ratio is to that session's median, and the history says how much sessions differ. SLOWER or FASTER
    needs both: no change lies outside the prediction interval, and the estimate beyond the margin. Under 6 sessions it is
    INCONCLUSIVE, with the ratio to the newest and no bounds. Raises ValueError for values that are not positive, or an
    impossible margin.
    """
    _require_margin(margin)
    if not all(0 < value < math.inf for value in (current, *history, *([] if base is None else [base]))):
        raise ValueError("anchored medians must be positive and finite")
    if not history:
        return Decision(Verdict.INCONCLUSIVE, "no_baseline", None, margin, against)
    if len(history) < MIN_SESSIONS:
        return Decision(
            Verdict.INCONCLUSIVE, "too_few_sessions", Interval.point(current / (base or history[-1])), margin, against
        )
    ratio = prediction_ratio(current, history, base=base)
    if ratio.low > 1 and ratio.estimate > 1 + margin:
        return Decision(Verdict.SLOWER, "beyond_margin", ratio, margin, against)
    if ratio.high < 1 and ratio.estimate < 1 - margin:
        return Decision(Verdict.FASTER, "beyond_margin", ratio, margin, against)
    return _undecided(ratio, margin, against)


def ratio_of_sessions(current: Sequence[float], stored: Sequence[float], seed: int | str = 0) -> Interval:
    """Ratio of two sessions' medians, one value per launch: with a bootstrap interval from 6 launches each, else without.

    The offset between sessions is not in the interval. Raises ValueError for values that are not positive.
    """
    if min(len(current), len(stored)) >= MIN_VALUES:
        return unpaired_ratio(current, stored, seed)
    return Interval.point(statistics.median(current) / statistics.median(stored))


def exit_code(decisions: Iterable[Decision], *, failed: bool = False, strict: bool = False) -> ExitCode:
    """What to exit with: what could not be measured comes before what is slower, and that before what is not known."""
    verdicts = {decision.verdict for decision in decisions}
    if failed or Verdict.INVALID in verdicts:
        return ExitCode.FAILED
    if Verdict.SLOWER in verdicts:
        return ExitCode.SLOWER
    return ExitCode.INCONCLUSIVE if strict and Verdict.INCONCLUSIVE in verdicts else ExitCode.OK
