"""The measuring protocol: launches of all configurations in alternating order, with timed, checked rounds.

    launch 0: A B C, launch 1: C B A, launch 2: A B C, ...

A launch is a fresh process that loads the model and runs one warm-up round before the timed ones. Alternation exposes all
configurations to the same state of the machine; reversing every other launch balances carry-over effects. In a
side-by-side plan the variants of one configuration are loaded together and their rounds alternate, A B, B A, A B, ...:
on a shared CPU the momentary noise is several times the variance between processes. Only one worker computes at a time.
The module is pure: processes, telemetry and the journal are passed in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from perf.session import image_check
from perf.session.measurements import Measurements, SlotMeasurements
from perf.session.plan import WARM_UP_ROUND, Plan, Slot
from perf.worker.wire import WorkerError


@dataclass(frozen=True)
class Limits:
    """Time limits of a worker's responses, in seconds."""

    load: float = 1800.0
    first_round: float = 3600.0  # includes torch.compile
    round: float = 1800.0


@dataclass
class Runner:
    """Runs a plan.

    open_launch(slot): context of a worker with `pid` and ask(operation, timeout_seconds, **arguments).
    load(slot): arguments of the worker's `load`. references(slot, seed): files of the reference images, or None.
    watch(pid): context with `telemetry` and `invalid` (a reason or None) once it has exited.
    write(event, content): stores a journal event. progress(launch, slot): called when a launch starts.
    """

    plan: Plan
    open_launch: Callable[[Slot], AbstractContextManager[Any]]
    load: Callable[[Slot], dict[str, Any]]
    references: Callable[[Slot, int], list[str] | None]
    watch: Callable[[int], AbstractContextManager[Any]]
    write: Callable[[str, dict[str, Any]], None]
    progress: Callable[[int, Slot], None]
    limits: Limits = Limits()

    def run(self, measurements: Measurements, first: int = 0) -> None:
        """Measure the missing rounds from launch `first` on."""
        for launch, slots in self.plan.turns(first):
            incomplete = [measurements.by_name[slot.name] for slot in slots]
            incomplete = [measured for measured in incomplete if not self._complete(launch, measured)]
            with contextlib.ExitStack() as stack:
                running = [
                    (measured, stack.enter_context(contextlib.closing(self._launch(launch, measured))))
                    for measured in incomplete
                ]
                while running:
                    running = [pair for pair in running if self._advance(launch, *pair)][::-1]

    def _complete(self, launch: int, measured: SlotMeasurements) -> bool:
        return measured.failure is not None or measured.next_round(launch)[0] >= self.plan.rounds

    def _advance(self, launch: int, measured: SlotMeasurements, rounds: Iterator[None]) -> bool:
        """Run the next step of a launch; False once it has ended."""
        try:
            next(rounds)
        except StopIteration:
            return False
        except WorkerError as error:
            self._record("failure", measured, launch, {"kind": error.kind, "message": str(error)})
            return False
        return True

    def _record(self, event: str, measured: SlotMeasurements, launch: int, content: dict[str, Any]) -> None:
        content = {"slot": measured.slot.name, "launch": launch, **content}
        self.write(event, content)
        measured.add({"event": event, **content})

    def _launch(self, launch: int, measured: SlotMeasurements) -> Generator[None, None, None]:
        """Load and warm up on the first step, then run one timed round a step."""
        slot = measured.slot
        self.progress(launch, slot)
        with self.open_launch(slot) as worker:
            loaded = worker.ask("load", self.limits.load, **self.load(slot))
            self._record("load", measured, launch, {"answer": loaded})
            answer = worker.ask("round", self.limits.first_round, seed=slot.seed(WARM_UP_ROUND))
            hashes = [answer["image"]["sha256"]]
            self._record("round", measured, launch, {"round": None, "answer": answer})
            while not self._complete(launch, measured):
                yield
                number, attempt = measured.next_round(launch)
                seed = slot.seed(number)
                check = self.references(slot, seed) if number == 0 else None
                with self.watch(worker.pid) as watched:
                    answer = worker.ask("round", self.limits.round, seed=seed, check=check)
                if attempt == 0:  # a retry has the same latents as the round it repeats, and so the same image
                    hashes.append(answer["image"]["sha256"])
                wrong = self._image_failure(slot, loaded, answer["image"], hashes)
                # One event holds the round and its image check, so that a kill cannot separate them.
                content = {"round": number, "attempt": attempt, "answer": answer, "wrong": wrong}
                content.update(telemetry=watched.telemetry, invalid=watched.invalid)
                self._record("round", measured, launch, content)

    def _image_failure(
        self, slot: Slot, loaded: dict[str, Any], image: dict[str, Any], hashes: list[str]
    ) -> str | None:
        configuration, device = slot.configuration, loaded["facts"]["device"]
        failure = image_check.image_failure(image, loaded["precision"], device, configuration.approximate)
        if failure or configuration.workload == "text":  # the text workload has the same input in every round
            return failure
        return image_check.repeated_output(hashes)
