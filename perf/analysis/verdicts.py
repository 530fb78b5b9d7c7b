"""Verdicts on measured ratios: rules, reason codes and exit codes. Pure: no torch, no pytest."""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from perf.analysis import paired
from perf.analysis.paired import LEVEL, LOOK_LEVEL, MIN_LAUNCHES
from perf.analysis.statistics import (
    MIN_SESSIONS,
    MIN_VALUES,
    Interval,
    prediction_half_width,
    prediction_ratio,
    unpaired_ratio,
)

# Reason codes of verdicts. A detail may follow a code, such as `anchor_drift 4.1 %`; the codes are stored in saved runs.
REASONS = {
    "beyond_margin": "the change exceeds the margin and is statistically significant",
    "within_margin": "the whole interval lies within twice the margin around no change",
    "straddles_margin": "the interval includes changes both within and beyond the margin",
    "interval_too_wide": "the interval is wider than four margins: measure more launches, or on a quieter machine",
    "too_few_rounds": "fewer than 2 launches with rounds of both sides: no interval exists",
    "too_few_sessions": "fewer than 6 stored sessions: the variation between unchanged sessions is unknown",
    "no_baseline": "no stored run to compare with",
    "no_anchor": "one side has no reference workload, or a different one, so that sessions cannot be compared",
    "other_configuration": "the stored configuration with this id did different work",
    "other_precision": "the stored configuration with this id ran in another precision, which `fast` chose there",
    "foreign_machine": "measured on another device or software stack: a difference is no evidence about the code",
    "wrong_image": "the image of a timed round failed the image check, which invalidates the timing",
    "anchor_drift": "the time of the reference workload drifted within the session, so that its times are no evidence",
    "control_arm": "the reference configuration, measured a second time in the session, differs from itself",
    "invalid_rounds": "too many rounds were throttled or shared the device with another process",
    "invalid_session": "the session is marked as invalid",
    "invalid_baseline": "the baseline is marked as invalid",
}


MOST_SESSIONS = 100  # proposed by an inconclusive comparison


class Verdict(enum.Enum):
    """The verdict on a configuration's speed, as written in the terminal, JSON, JUnit and reports."""

    SLOWER = "SLOWER"
    FASTER = "FASTER"
    SAME = "SAME"
    INCONCLUSIVE = "INCONCLUSIVE"
    INVALID = "INVALID"


class ExitCode(enum.IntEnum):
    """Exit status of commands that give verdicts."""

    OK = 0
    FAILED = 1  # a test or an image check failed, or a configuration could not be measured
    REFUSED = 4  # usage error, unreadable or foreign baseline
    SLOWER = 20  # and no other failure
    INCONCLUSIVE = 21  # only with --perf-strict


@dataclass(frozen=True)
class Decision:
    """A verdict with its evidence.

    reason: begins with a code of REASONS, else ValueError. ratio: new / old seconds; between sessions each divided by the
    reference workload's seconds. margin: a fraction. against: the name of the baseline. raw_ratio: between sessions, of
    the seconds themselves. launches: of both sides, for a comparison within a session.
    """

    verdict: Verdict
    reason: str
    ratio: Interval | None = None
    margin: float | None = None
    against: str | None = None
    raw_ratio: float | None = None
    launches: int | None = None

    def __post_init__(self) -> None:
        if self.code not in REASONS:
            raise ValueError(f"unknown reason {self.reason!r}; known: {', '.join(REASONS)}")

    @property
    def code(self) -> str:
        """The reason code without its detail."""
        return self.reason.partition(" ")[0]

    def as_dict(self) -> dict[str, object]:
        """The decision as JSON types, stored under `verdict` in a saved run."""
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "ratio": self.ratio.as_dict() if self.ratio else None,
            "margin": self.margin,
            "against": self.against,
            "raw_ratio": self.raw_ratio,
            "launches": self.launches,
        }

    def __str__(self) -> str:
        """For example `SLOWER +6.2 % [4.9, 7.7] against 0007_nightly (beyond_margin)`.

        Between sessions the unit and the raw ratio follow: `+6.2 % [4.9, 7.7] in reference workloads, raw +9.0 %`.
        """
        parts = [self.verdict.value]
        if self.ratio:
            parts.append(f"{percent(self.ratio.estimate):+.1f} %")
            if self.ratio.bounded:
                parts.append(f"[{percent(self.ratio.low):.1f}, {percent(self.ratio.high):.1f}]")
        if self.raw_ratio is not None:
            parts.append(f"in reference workloads, raw {percent(self.raw_ratio):+.1f} %,")
        if self.against:
            parts.append(f"against {self.against}")
        return " ".join([*parts, f"({self.reason})"])


def percent(ratio: float) -> float:
    """A ratio as a change in percent, rounded to a tenth and never -0.0."""
    return round(100 * (ratio - 1), 1) + 0.0


def _require_margin(margin: float) -> None:
    if not 0 < margin < math.inf:
        raise ValueError(f"the margin must be a positive fraction such as 0.01, not {margin}")


def _undecided(ratio: Interval, margin: float, against: str | None) -> Decision:
    """SAME if the interval lies within twice the margin, else INCONCLUSIVE with the reason."""
    if 1 - 2 * margin <= ratio.low and ratio.high <= 1 + 2 * margin:
        return Decision(Verdict.SAME, "within_margin", ratio, margin, against)
    reason = "interval_too_wide" if ratio.high - ratio.low > 4 * margin else "straddles_margin"
    return Decision(Verdict.INCONCLUSIVE, reason, ratio, margin, against)


def decide_interval(ratio: Interval, margin: float, against: str | None = None) -> Decision:
    """Judge a ratio within one session: SLOWER or FASTER if the whole interval lies beyond the margin.

    Margin and interval are combined as in criterion.rs: an interval alone reports irrelevant differences, a threshold
    alone reports noise. Raises ValueError for an impossible margin.
    """
    _require_margin(margin)
    if ratio.low > 1 + margin:
        return Decision(Verdict.SLOWER, "beyond_margin", ratio, margin, against)
    if ratio.high < 1 - margin:
        return Decision(Verdict.FASTER, "beyond_margin", ratio, margin, against)
    return _undecided(ratio, margin, against)


def decide_paired(
    effects: Sequence[float],
    margin: float,
    level: float = LEVEL,
    against: str | None = None,
    launch_seconds: float | None = None,
) -> Decision:
    """Judge two series of one session by the log ratios of their launches (perf.analysis.paired.launch_effects).

    An INCONCLUSIVE decision has the difference that would have been detected, and the launches that detect twice the
    margin. launch_seconds: of one launch of both sides, for their time. Fewer than 2 launches are INCONCLUSIVE. Raises
    ValueError for an impossible margin.
    """
    _require_margin(margin)
    if len(effects) < MIN_LAUNCHES:
        advice = f"--perf-launches {paired.LOOKS[0]}{_minutes(paired.LOOKS[0], launch_seconds)}"
        reason = f"too_few_rounds no difference was detectable; {advice}"
        return Decision(Verdict.INCONCLUSIVE, reason, None, margin, against, launches=len(effects))
    decision = decide_interval(paired.ratio_of_effects(effects, level), margin, against)
    detail = _detectable(effects, margin, level, launch_seconds) if decision.verdict is Verdict.INCONCLUSIVE else ""
    return replace(decision, reason=decision.reason + detail, launches=len(effects))


def _detectable(effects: Sequence[float], margin: float, level: float, launch_seconds: float | None) -> str:
    visible = 100 * paired.detectable(effects, margin, level)
    launches = paired.launches_for(effects, 2 * margin, margin)
    smallest = f"{200 * margin:.1f} %"
    if launches is None:
        return f" {visible:.1f} % was detectable; {smallest} needs more than {paired.MOST_LAUNCHES} launches"
    minutes = _minutes(launches, launch_seconds)
    return f" {visible:.1f} % was detectable; --perf-launches {launches} detects {smallest}{minutes}"


def _minutes(launches: int, launch_seconds: float | None) -> str:
    return f" in about {max(1, round(launches * launch_seconds / 60))} min" if launch_seconds else ""


def decide_looks(
    effects: Sequence[float],
    margin: float,
    looks: Sequence[int],
    against: str | None = None,
    launch_seconds: float | None = None,
) -> tuple[Decision, bool]:
    """Judge a group-sequential comparison: (decision of the last look taken, whether another look is needed).

    effects: log ratios of launches in order, as many as were measured. looks: numbers of launches after which the
    comparison is judged, at LOOK_LEVEL where there are several. It ends at the first verdict, at the last look, or where
    no further look could give one (perf.analysis.paired.is_futile). Raises ValueError for an impossible margin.
    """
    level = LOOK_LEVEL if len(looks) > 1 else LEVEL
    for look in looks:
        decision = decide_paired(effects[:look], margin, level, against, launch_seconds)
        if len(effects) < look:  # interrupted, or with failed rounds
            return decision, True
        if decision.verdict is not Verdict.INCONCLUSIVE or look == looks[-1]:
            return decision, False
        if paired.is_futile(effects[:look], margin, looks):
            return decision, False
        if len(effects) == look:
            return decision, True
    raise ValueError("needs at least one look")


def decide_against_history(
    current: float, history: Sequence[float], margin: float, against: str | None = None, base: float | None = None
) -> Decision:
    """Judge a new session against stored sessions, oldest first, by medians in units of the reference workload's time.

    With `base` the ratio is to that session's median, and the history gives the variation between sessions. SLOWER and
    FASTER require a prediction interval that excludes no change, and an estimate beyond the margin. Fewer than 6 sessions
    are INCONCLUSIVE, with the ratio to the newest and no bounds. Raises ValueError for values that are not positive, or
    an impossible margin.
    """
    _require_margin(margin)
    if not all(0 < value < math.inf for value in (current, *history, *([] if base is None else [base]))):
        raise ValueError("medians must be positive and finite")
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
    decision = _undecided(ratio, margin, against)
    detail = _detectable_between(history, margin, base is not None) if decision.verdict is Verdict.INCONCLUSIVE else ""
    return replace(decision, reason=decision.reason + detail)


def _detectable_between(history: Sequence[float], margin: float, named: bool) -> str:
    visible = 100 * max(margin, math.expm1(prediction_half_width(history, len(history), named)))
    if visible <= 200 * margin:
        return f" {visible:.1f} % was detectable"
    smallest = f"{200 * margin:.1f} %"
    counts = range(len(history) + 1, MOST_SESSIONS + 1)
    needed = next(
        (count for count in counts if prediction_half_width(history, count, named) <= math.log1p(2 * margin)), None
    )
    if needed is None:
        return f" {visible:.1f} % was detectable; these sessions vary too much for {smallest}: --perf-against"
    return f" {visible:.1f} % was detectable; {needed} stored sessions detect {smallest}"


def ratio_of_sessions(current: Sequence[float], stored: Sequence[float], seed: int | str = 0) -> Interval:
    """The ratio of two sessions' medians of launches, with a bootstrap interval from 6 launches each on.

    The interval excludes the variation between sessions. Raises ValueError for values that are not positive.
    """
    if min(len(current), len(stored)) >= MIN_VALUES:
        return unpaired_ratio(current, stored, seed)
    return Interval.point(statistics.median(current) / statistics.median(stored))


def exit_code(decisions: Iterable[Decision], *, failed: bool = False, strict: bool = False) -> ExitCode:
    """The exit code of several decisions: failures precede regressions, which precede inconclusive verdicts."""
    verdicts = {decision.verdict for decision in decisions}
    if failed or Verdict.INVALID in verdicts:
        return ExitCode.FAILED
    if Verdict.SLOWER in verdicts:
        return ExitCode.SLOWER
    return ExitCode.INCONCLUSIVE if strict and Verdict.INCONCLUSIVE in verdicts else ExitCode.OK
