"""A simulated machine for tests of the measuring protocol."""

from __future__ import annotations

import contextlib
import copy
import json
from dataclasses import dataclass
from types import SimpleNamespace

from fake_worker import Fake

from perf.configurations.configuration import Configuration
from perf.session.measurements import Measurements
from perf.session.plan import SEED_STRIDE, Plan, Slot
from perf.session.runner import Limits, Runner
from perf.worker.wire import WorkerError, parse_response

A = Configuration(attention="original", steps=2)
B = Configuration(attention="mha", steps=2)
C = Configuration(attention="sdpa", steps=2)
THREE = tuple(map(Slot, (A, B, C)))


class Stopped(BaseException):
    """A simulated kill of the runner."""


class Bench:
    """The fake worker in this process, deterministic by slot, launch and round.

    bad: {(slot name, launch, seed): number of consecutive invalid tries}. kill_after: number of events after which the
    runner is stopped. errors: {(slot name, launch): (operation, kind)}.
    """

    def __init__(
        self,
        plan: Plan,
        script: dict | None = None,
        events=(),
        bad=None,
        kill_after=None,
        errors=None,
        settled=lambda measurements, launch, slots: True,
    ):
        self.loads_at_once, self.settled = 1, settled
        self.plan, self.script = plan, script or {"noise": 0.01}
        self.events, self.turns, self.asked = list(events), [], []
        self.bad, self.kill_after, self.errors = dict(bad or {}), kill_after, dict(errors or {})
        self.tries: dict = {}
        for event in self.events:  # tries before the kill
            if event["event"] == "round" and event["round"] is not None:
                self._try(event["slot"], event["launch"], event["answer"]["seed"])

    def _try(self, *key) -> int:
        self.tries[key] = self.tries.get(key, 0) + 1
        return self.tries[key]

    def run(self, plan: Plan | None = None, first: int = 0, last: int | None = None) -> Measurements:
        measurements = Measurements(self.plan, copy.deepcopy(self.events))
        self.runner(plan).run(measurements, first, last)
        return measurements

    def runner(self, plan: Plan | None = None) -> Runner:
        return Runner(
            plan or self.plan,
            open_launch=self.open,
            load=lambda slot: {
                "configuration": slot.configuration.as_dict(),
                "device": "cpu",
                "slowdown": 0.0,
                "threads": 1,
            },
            references=lambda slot, seed: [],
            watch=self.watch,
            write=self.write,
            progress=self.progress,
            limits=Limits(1, 2, 3),
            loads_at_once=self.loads_at_once,
            settled=self.settled,
        )

    def progress(self, launch: int, slot: Slot, round_number: int | None) -> None:
        if round_number is None:
            self.turns.append((launch, slot.name))

    def write(self, event: str, content: dict) -> None:
        if self.kill_after is not None and len(self.events) >= self.kill_after:
            raise Stopped
        self.events.append(json.loads(json.dumps({"event": event, **content}, allow_nan=False)))

    @contextlib.contextmanager
    def open(self, slot: Slot):
        launch = self.turns[-1][0]
        yield Asked(self, slot, launch, Fake(self.script, launch))

    @contextlib.contextmanager
    def watch(self, pid: int):
        watched = SimpleNamespace(telemetry={"pid": pid}, invalid=None)
        yield watched
        key = self.asked[-1]
        if self._try(*key) <= self.bad.get(key, 0):
            watched.invalid = "throttled"


@dataclass
class Asked:
    bench: Bench
    slot: Slot
    launch: int
    fake: Fake
    pid: int = 77
    sent: tuple = ()

    def send(self, operation: str, **arguments) -> None:
        self.sent = (operation, arguments)

    def receive(self, timeout_seconds: float) -> dict:
        operation, arguments = self.sent
        return self.ask(operation, timeout_seconds, **arguments)

    def ask(self, operation: str, timeout_seconds: float, **arguments) -> dict:
        failing = self.bench.errors.get((self.slot.name, self.launch))
        if failing and failing[0] == operation:
            raise WorkerError(failing[1], "so the test says")
        answer = parse_response(self.fake.handle({"op": operation, **arguments}))
        if operation == "round":
            self.bench.asked.append((self.slot.name, self.launch, arguments["seed"]))
            order = self.bench.plan.slots.index(self.slot)
            answer.update(
                seed=arguments["seed"], started_unix_seconds=1000.0 * self.launch + order + arguments["seed"] / 1e6
            )
        return answer


def seeds(count: int) -> list[int]:
    return [1 + SEED_STRIDE * number for number in range(count)]


def result(measurements: Measurements) -> dict:
    """Everything that later stages read from measurements."""
    return {
        "slots": {
            name: {
                "failure": one.failure,
                "discarded": one.discarded,
                "launches": {
                    number: (launch.load, launch.first_call_seconds, launch.rounds)
                    for number, launch in sorted(one.launches.items())
                },
            }
            for name, one in measurements.by_name.items()
        },
        "counts": measurements.counts(),
        "drift": measurements.drift(),
        "invalid": measurements.invalid(),
    }


WRONG = {
    "not_finite": {"finite": False},
    "constant": {"constant": True},
    "latents": {"latent_relative_error": 0.5, "psnr_db": 90.0},
    "image": {"latent_relative_error": 0.0, "psnr_db": 10.0},
    "repeated_output": {"sha256": "the same"},
}


def wrong(image: dict, id: str = B.id, **when) -> dict:
    return {"noise": 0.01, "at": [{"op": "round", "id": id, "do": "change", "image": image, **when}]}
