"""The protocol: in which order configurations take turns, and what is kept of each round.

    launch 0: A B C, launch 1: C B A, launch 2: A B C, ...

A launch is a fresh process that loads, makes one warm-up round and then the timed ones. What the machine does meanwhile
meets all configurations alike, and mirroring every other launch balances what one leaves behind for the next. Side by
side, the variants of one configuration are loaded together and their rounds take turns, A B, B A, A B, ...: on a shared
processor the noise of the moment is several times what processes differ in by themselves. Only one ever works.
Pure: what a launch is, how a round is watched and where events are written is given from outside.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from perf import images
from perf.configurations import Configuration
from perf.launcher import WorkerError
from perf.statistics import drift

ROUND_APART = 1000  # seeds of neighbouring rounds differ by more than a batch, since image i has the round's seed + i
WARM_UP = 999
RETRIES = 3  # of an invalid round
ANCHOR_DRIFT_LIMIT = 0.03
FEWEST_ANCHORS = 9  # three for each third of a session; of fewer a median says nothing about drift
INVALID_SHARE_LIMIT = 0.2
# Failures that may not happen again, so that --perf-resume tries once more.
PASSING = ("died", "hung", "rubbish", "failed", "out_of_memory")


@dataclass(frozen=True)
class Slot:
    """What takes a turn: a configuration, as it is, of another commit (`base`), or the same once more (`aa`)."""

    configuration: Configuration
    variant: str | None = None

    @property
    def name(self) -> str:
        """The configuration's id, with the variant behind an @."""
        return self.configuration.id + (f"@{self.variant}" if self.variant else "")


@dataclass(frozen=True)
class Plan:
    """How much is measured of what. side_by_side: the variants of a configuration share their turn."""

    slots: tuple[Slot, ...]
    launches: int
    rounds: int
    side_by_side: bool = False

    def turns(self, first: int = 0) -> Iterator[tuple[int, tuple[Slot, ...]]]:
        """(launch, slots of one turn) in order; every odd launch runs backwards."""
        for launch in range(first, self.launches):
            slots = self.slots if launch % 2 == 0 else self.slots[::-1]
            if not self.side_by_side:
                yield from ((launch, (slot,)) for slot in slots)
                continue
            for _, together in itertools.groupby(slots, key=lambda slot: slot.configuration):
                yield launch, tuple(together)

    def doubled(self, names: Iterable[str]) -> Plan:
        """The same with twice the launches, for the configurations of the given slots alone."""
        ids = {self.slot(name).configuration.id for name in names}
        slots = tuple(slot for slot in self.slots if slot.configuration.id in ids)
        return replace(self, slots=slots, launches=2 * self.launches)

    def slot(self, name: str) -> Slot:
        """The slot of that name."""
        return next(slot for slot in self.slots if slot.name == name)

    def as_dict(self) -> dict[str, Any]:
        """What a journal must agree with to be gone on from."""
        slots = [slot.name for slot in self.slots]
        # A name leaves out what is the same for most: the prompt, the folder of the weights.
        configurations = [slot.configuration.as_dict() for slot in self.slots if slot.variant is None]
        return {"slots": slots, "launches": self.launches, "rounds": self.rounds, "configurations": configurations}


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


@dataclass(frozen=True)
class Limits:
    """Seconds that a worker may take for an answer."""

    load: float = 1800.0
    first_round: float = 3600.0  # torch.compile is in it
    round: float = 1800.0


class Runner:
    """Runs a plan.

    open_launch(slot) gives a context with ask(operation, timeout_seconds, **arguments), as perf.launcher has them;
    load(slot) the arguments of its `load`; references(slot, seed) the files that a picture is compared with, or None;
    watch(pid) a context whose result has `telemetry` and `invalid` (a reason or None) when it is left; write(event,
    content) keeps an event; progress(launch, slot) is told what starts.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        open_launch: Callable[[Slot], AbstractContextManager[Any]],
        load: Callable[[Slot], dict[str, Any]],
        references: Callable[[Slot, int], Any],
        watch: Callable[[int], AbstractContextManager[Any]],
        write: Callable[[str, dict[str, Any]], None],
        progress: Callable[[int, Slot], None],
        limits: Limits = Limits(),
    ):
        self.plan, self.limits = plan, limits
        self.open_launch, self.load, self.references = open_launch, load, references
        self.watch, self.write, self.progress = watch, write, progress

    def run(self, measurements: Measurements, first: int = 0) -> None:
        """Measure what is not there yet, from launch `first` on."""
        for launch, slots in self.plan.turns(first):
            missing = []
            for slot in slots:
                measured = measurements.by_name[slot.name]
                if not measured.failure and measured.next(launch)[0] < self.plan.rounds:
                    missing.append(measured)
            with contextlib.ExitStack() as ends:
                under_way = [
                    (measured, ends.enter_context(contextlib.closing(self._launch(launch, measured))))
                    for measured in missing
                ]
                while under_way:
                    under_way = [one for one in under_way if self._goes_on(launch, *one)][::-1]

    def _goes_on(self, launch: int, measured: Measured, rounds: Iterator[None]) -> bool:
        """Let a launch get ready or make one round; False once it has ended."""
        try:
            next(rounds)
        except StopIteration:
            return False
        except WorkerError as error:
            self._note("failure", measured, launch, {"kind": error.kind, "message": str(error)})
            return False
        return True

    def _note(self, event: str, measured: Measured, launch: int, content: dict[str, Any]) -> None:
        content = {"slot": measured.slot.name, "launch": launch, **content}
        self.write(event, content)
        measured.add({"event": event, **content})

    def _launch(self, launch: int, measured: Measured) -> Generator[None, None, None]:
        """A generator that loads and warms up, and then makes one round whenever it is gone on with."""
        slot = measured.slot
        self.progress(launch, slot)
        with self.open_launch(slot) as worker:
            answer = worker.ask("load", self.limits.load, **self.load(slot))
            self._note("load", measured, launch, {"answer": answer})
            device = answer["facts"]["device"]
            precision = answer["precision"]
            seed = slot.configuration.seed
            answer = worker.ask("round", self.limits.first_round, seed=seed + ROUND_APART * WARM_UP)
            hashes = [answer["image"]["sha256"]]
            self._note("round", measured, launch, {"round": None, "answer": answer})
            while measured.next(launch)[0] < self.plan.rounds and not measured.failure:
                yield
                number, attempt = measured.next(launch)
                seed = slot.configuration.seed + ROUND_APART * number
                check = self.references(slot, seed) if number == 0 else None
                with self.watch(worker.pid) as watched:
                    answer = worker.ask("round", self.limits.round, seed=seed, check=check)
                if attempt == 0:  # a repetition has the latents, and so the picture, of the round that it repeats
                    hashes.append(answer["image"]["sha256"])
                wrong = images.wrong(answer["image"], precision, device, slot.configuration.approximate)
                if slot.configuration.workload != "text":  # whose input is the same in every round
                    wrong = wrong or images.repeated(hashes)
                # What is wrong with a picture is in its own event: a kill cannot come between the two.
                content = {"round": number, "attempt": attempt, "answer": answer, "wrong": wrong}
                content.update(telemetry=watched.telemetry, invalid=watched.invalid)
                self._note("round", measured, launch, content)
