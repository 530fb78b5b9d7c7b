"""Measured launches and rounds of each slot, built from journal events."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from perf.analysis.statistics import drift, least_drift
from perf.session.plan import Plan, Slot

MAX_RETRIES = 3  # of an invalid round
INVALID_SHARE_LIMIT = 0.2  # of all rounds
DRIFT_LIMIT = 0.03  # of the reference workload
UNBOUNDED_DRIFT_LIMIT = 0.1  # of a session with too few launches for a lower bound
MIN_DRIFT_ROUNDS = 9  # three for each third of a session; the median of fewer is no evidence of drift
REFERENCE_SECONDS = "anchor_seconds"  # the key of the reference workload's time in a round, as first released
TRANSIENT_FAILURES = ("died", "hung", "invalid_response", "failed", "out_of_memory")  # retried by --perf-resume
FORMER_FAILURE_KINDS = {
    "rubbish": "invalid_response",
    "wrong_picture": "wrong_image",
}  # in journals of earlier versions


class Failure(NamedTuple):
    """Why a slot has no further rounds. kind: of a perf.worker.wire.WorkerError, or `wrong_image`."""

    kind: str
    message: str


@dataclass
class Launch:
    """Measurements of one launch. rounds: the valid ones, and those that were invalid after all retries."""

    load: dict[str, Any]
    first_call_seconds: float | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def valid(self) -> list[dict[str, Any]]:
        """The valid rounds."""
        return [round_ for round_ in self.rounds if round_["invalid"] is None]


@dataclass
class SlotMeasurements:
    """Measurements of one slot. discarded: number of invalid rounds, retries included. counts: of the worker's `count`."""

    slot: Slot
    launches: dict[int, Launch] = field(default_factory=dict)
    failure: Failure | None = None
    discarded: int = 0
    counts: dict[str, Any] | None = None

    def add(self, event: dict[str, Any]) -> None:
        """Apply an event, newly measured or read from a journal."""
        number = event["launch"]
        if event["event"] == "failure":
            self.failure = Failure(FORMER_FAILURE_KINDS.get(event["kind"], event["kind"]), event["message"])
        elif event["event"] == "load":
            self.launches.setdefault(number, Launch(event["answer"]))
        elif event["event"] == "counts":
            self.counts = event["answer"]
        elif event["round"] is None:
            self.launches[number].first_call_seconds = event["answer"]["wall_seconds"]
        else:
            rounds = self.launches[number].rounds
            if rounds and rounds[-1]["round"] == event["round"]:  # a retry replaces the invalid round
                rounds.pop()
            rounds.append(
                {**event["answer"], **{key: event[key] for key in ("round", "attempt", "invalid", "telemetry")}}
            )
            self.discarded += event["invalid"] is not None
            if event["wrong"]:
                self.failure = Failure("wrong_image", event["wrong"])

    def next_round(self, launch: int) -> tuple[int, int]:
        """The (round, attempt) with which a launch continues; an invalid round is repeated MAX_RETRIES times."""
        rounds = self.launches[launch].rounds if launch in self.launches else []
        if rounds and rounds[-1]["invalid"] is not None and rounds[-1]["attempt"] < MAX_RETRIES:
            return len(rounds) - 1, rounds[-1]["attempt"] + 1
        return len(rounds), 0

    def median(self, launch: int) -> float | None:
        """The median seconds of a launch's valid rounds: the launch is the unit of comparison."""
        seconds = [round_["seconds"] for round_ in self.launches[launch].valid()]
        return statistics.median(seconds) if seconds else None

    def ordered_launches(self) -> list[Launch]:
        """The launches by number."""
        return [launch for _, launch in sorted(self.launches.items())]

    def rounds(self) -> list[dict[str, Any]]:
        """The valid rounds of all launches, in order."""
        return [round_ for launch in self.ordered_launches() for round_ in launch.valid()]


def paired_rounds(
    first: SlotMeasurements, second: SlotMeasurements, clock: str = "seconds"
) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of the rounds that are valid on both sides, by launch and cycle, for perf.analysis.paired.

    clock: `seconds` of the session's clock, or `wall_seconds`.
    Both lists have an entry for each launch number of either side, empty where the other side has no such round.
    """
    launches = [launch_rounds(first, second, number, clock) for number in sorted({*first.launches, *second.launches})]
    return [ours for ours, _ in launches], [theirs for _, theirs in launches]


def launch_rounds(
    first: SlotMeasurements, second: SlotMeasurements, launch: int, clock: str = "seconds"
) -> tuple[list[float], list[float]]:
    """Seconds of the rounds of one launch that are valid on both sides, by cycle."""
    ours, theirs = _seconds_by_round(first, launch, clock), _seconds_by_round(second, launch, clock)
    common = sorted(ours.keys() & theirs.keys())
    return [ours[cycle] for cycle in common], [theirs[cycle] for cycle in common]


def _seconds_by_round(measured: SlotMeasurements, launch: int, clock: str) -> dict[int, float]:
    rounds = measured.launches[launch].valid() if launch in measured.launches else []
    return {round_["round"]: round_[clock] for round_ in rounds}


class Measurements:
    """Measurements of every slot of a plan. Raises ValueError for events that do not belong to the plan."""

    def __init__(self, plan: Plan, events: Iterable[dict[str, Any]] = ()):
        self.plan = plan
        self.by_name = {slot.name: SlotMeasurements(slot) for slot in plan.slots}
        for event in events:
            if event["event"] in ("load", "counts", "round", "failure"):
                self._check(event)
                self.by_name[event["slot"]].add(event)
        # Tried once more, but not beside others: rounds made hours after theirs would look like neighbours of them.
        for slots in plan.groups():
            measured = self.by_name[slots[0].name]
            if len(slots) == 1 and measured.failure and measured.failure.kind in TRANSIENT_FAILURES:
                measured.failure = None

    def _check(self, event: dict[str, Any]) -> None:
        known = event.get("slot") in self.by_name and isinstance(event.get("launch"), int)
        if not known or not 0 <= event["launch"] < self.plan.most_launches:
            raise ValueError(f"an event of no slot of this plan: {event.get('slot')!r}")
        if event["event"] == "round" and event["launch"] not in self.by_name[event["slot"]].launches:
            raise ValueError(f"a round of a launch that was never loaded: {event['slot']}")

    def most_launches(self) -> int:
        """The launches of the slot that has most."""
        return max((len(measured.launches) for measured in self.by_name.values()), default=0)

    def drift(self) -> float | None:
        """The drift of the reference workload: thirds of the session against its median, as a fraction; None if too short."""
        times = [seconds for _, seconds in sorted(time[1:] for time in self._reference_times())]
        return drift(times) if len(times) >= MIN_DRIFT_ROUNDS else None

    def least_drift(self) -> float | None:
        """The lower bound of the drift, as a fraction; None if the session is too short for one."""
        launches: dict[int, list[tuple[float, float]]] = {}
        for launch, start, seconds in self._reference_times():
            launches.setdefault(launch, []).append((start, seconds))
        ordered = sorted(launches.values(), key=min)
        return least_drift([[seconds for _, seconds in launch] for launch in ordered])

    def drifted(self) -> str | None:
        """Why the session's absolute times are no baseline, as a reason code with its detail, or None."""
        estimate, low = self.drift() or 0.0, self.least_drift()
        if low is None:
            exceeded, bound, limit = estimate > UNBOUNDED_DRIFT_LIMIT, "without a bound", UNBOUNDED_DRIFT_LIMIT
        else:
            exceeded, bound, limit = low > DRIFT_LIMIT, f"at least {100 * low:.1f} %", DRIFT_LIMIT
        return f"anchor_drift {100 * estimate:.1f} %, {bound}; {100 * limit:g} % allowed" if exceeded else None

    def _reference_times(self) -> Iterator[tuple[int, float, float]]:
        """Yield (launch, start, reference workload's time) of every valid round.

        The time is relative to the median of its device and interpreter: the reference workload's speed depends on the
        torch version, which is not drift.
        """
        groups: dict[tuple[str | None, str | None], list[tuple[int, dict[str, Any]]]] = {}
        for measured in self.by_name.values():
            configuration = measured.slot.configuration
            rounds = [(number, round_) for number, launch in measured.launches.items() for round_ in launch.valid()]
            groups.setdefault((configuration.device, configuration.interpreter), []).extend(rounds)
        for rounds in filter(None, groups.values()):
            median = statistics.median(round_[REFERENCE_SECONDS] for _, round_ in rounds)
            for number, round_ in rounds:
                yield number, round_["started_unix_seconds"], round_[REFERENCE_SECONDS] / median

    def counts(self) -> tuple[int, int]:
        """(rounds discarded as invalid, all rounds)."""
        discarded = sum(measured.discarded for measured in self.by_name.values())
        return discarded, discarded + sum(len(measured.rounds()) for measured in self.by_name.values())

    def invalid(self) -> str | None:
        """Why the whole session is invalid, as a reason code with its detail, or None."""
        discarded, total = self.counts()
        if total and discarded > INVALID_SHARE_LIMIT * total:
            return f"invalid_rounds {100 * discarded / total:.0f} %, {100 * INVALID_SHARE_LIMIT:g} % allowed"
        return None
