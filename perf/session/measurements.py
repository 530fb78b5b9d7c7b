"""Measured launches and rounds of each slot, from journal events."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from perf.analysis.statistics import drift
from perf.session.plan import Plan, Slot

RETRIES = 3  # of an invalid round


ANCHOR_DRIFT_LIMIT = 0.03


FEWEST_ANCHORS = 9  # three for each third of a session; of fewer a median says nothing about drift


INVALID_SHARE_LIMIT = 0.2


# Failures that may not happen again, so that --perf-resume tries once more.
PASSING = ("died", "hung", "rubbish", "failed", "out_of_memory")


@dataclass
class Launch:
    """What is known of one launch of one slot."""

    load: dict[str, Any]
    first_call_seconds: float | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)  # valid ones, and those that stayed invalid

    def valid(self) -> list[dict[str, Any]]:
        """The rounds that count."""
        return [one for one in self.rounds if one["invalid"] is None]


@dataclass
class Measured:
    """What is known of one slot. failure: (kind, message) once it cannot go on."""

    slot: Slot
    launches: dict[int, Launch] = field(default_factory=dict)
    failure: tuple[str, str] | None = None
    thrown_away: int = 0

    def add(self, event: dict[str, Any]) -> None:
        """Take in an event, just measured or read from a journal."""
        number = event["launch"]
        if event["event"] == "failure":
            self.failure = event["kind"], event["message"]
        elif event["event"] == "load":
            self.launches.setdefault(number, Launch(event["answer"]))
        elif event["round"] is None:
            self.launches[number].first_call_seconds = event["answer"]["wall_seconds"]
        else:
            rounds = self.launches[number].rounds
            if rounds and rounds[-1]["round"] == event["round"]:  # the repetition of an invalid one
                rounds.pop()
            kept = {key: event[key] for key in ("round", "attempt", "invalid", "telemetry")}
            rounds.append({**event["answer"], **kept})
            self.thrown_away += event["invalid"] is not None
            if event["wrong"]:
                self.failure = "wrong_picture", event["wrong"]

    def next(self, launch: int) -> tuple[int, int]:
        """(round, attempt) of a launch with which it goes on; an invalid round is repeated RETRIES times."""
        rounds = self.launches[launch].rounds if launch in self.launches else []
        if rounds and rounds[-1]["invalid"] is not None and rounds[-1]["attempt"] < RETRIES:
            return len(rounds) - 1, rounds[-1]["attempt"] + 1
        return len(rounds), 0

    def median(self, launch: int) -> float | None:
        """The median seconds of a launch's valid rounds: the launch is the unit of comparison."""
        seconds = [one["seconds"] for one in self.launches[launch].valid()]
        return statistics.median(seconds) if seconds else None

    def rounds(self) -> list[dict[str, Any]]:
        """Every valid round, launch after launch."""
        return [one for _, launch in sorted(self.launches.items()) for one in launch.valid()]


def paired_medians(one: Measured, other: Measured) -> tuple[list[float], list[float]]:
    """Median seconds of the launches, by number, in which both have a valid round."""
    medians = [(one.median(n), other.median(n)) for n in sorted(one.launches) if n in other.launches]
    both = [(a, b) for a, b in medians if a is not None and b is not None]
    return [a for a, _ in both], [b for _, b in both]


class Measurements:
    """What is known of every slot of a plan, from events."""

    def __init__(self, plan: Plan, events: Iterable[dict[str, Any]] = ()):
        self.plan = plan
        self.by_name = {slot.name: Measured(slot) for slot in plan.slots}
        for event in events:
            if event["event"] in ("load", "round", "failure"):
                self._check(event)
                self.by_name[event["slot"]].add(event)
        for measured in self.by_name.values():
            if measured.failure and measured.failure[0] in PASSING:
                measured.failure = None

    def _check(self, event: dict[str, Any]) -> None:
        known = event.get("slot") in self.by_name and isinstance(event.get("launch"), int)
        if not known or not 0 <= event["launch"] < 2 * self.plan.launches:  # twice, when it was undecided
            raise ValueError(f"an event of no slot of this plan: {event.get('slot')!r}")
        if event["event"] == "round" and event["launch"] not in self.by_name[event["slot"]].launches:
            raise ValueError(f"a round of a launch that was never loaded: {event['slot']}")

    def drift(self) -> float | None:
        """How far the anchor moved during the session: thirds of it against the whole, as a fraction; None if too short."""
        anchors = [seconds for _, seconds in sorted(self._anchors())]
        return drift(anchors) if len(anchors) >= FEWEST_ANCHORS else None

    def _anchors(self) -> Iterator[tuple[float, float]]:
        """(when, anchor) of every valid round, as a multiple of the median on the same device by the same interpreter.

        Another torch computes the anchor at another speed, and which part of the session it has is no drift.
        """
        groups: dict[tuple[str | None, str | None], list[dict[str, Any]]] = {}
        for measured in self.by_name.values():
            configuration = measured.slot.configuration
            groups.setdefault((configuration.device, configuration.interpreter), []).extend(measured.rounds())
        for rounds in groups.values():
            middle = statistics.median(one["anchor_seconds"] for one in rounds) if rounds else None
            yield from ((one["started_unix_seconds"], one["anchor_seconds"] / middle) for one in rounds)

    def counts(self) -> tuple[int, int]:
        """(rounds thrown away as invalid, rounds measured)."""
        thrown = sum(measured.thrown_away for measured in self.by_name.values())
        return thrown, thrown + sum(len(measured.rounds()) for measured in self.by_name.values())

    def invalid(self) -> str | None:
        """Why the session as a whole cannot be trusted, as `code words`, or None."""
        drift = self.drift()
        if drift is not None and drift > ANCHOR_DRIFT_LIMIT:
            return f"anchor_drift {100 * drift:.1f} %, {100 * ANCHOR_DRIFT_LIMIT:g} % allowed"
        thrown, total = self.counts()
        if total and thrown > INVALID_SHARE_LIMIT * total:
            return f"invalid_rounds {100 * thrown / total:.0f} %, {100 * INVALID_SHARE_LIMIT:g} % allowed"
        return None
