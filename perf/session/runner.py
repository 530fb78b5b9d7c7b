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
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from perf.session import image_check
from perf.session.measurements import Measured, Measurements
from perf.session.plan import ROUND_APART, WARM_UP, Plan, Slot
from perf.worker.wire import WorkerError


@dataclass(frozen=True)
class Limits:
    """Seconds that a worker may take for an answer."""

    load: float = 1800.0
    first_round: float = 3600.0  # torch.compile is in it
    round: float = 1800.0


class Runner:
    """Runs a plan.

    open_launch(slot) gives a context with ask(operation, timeout_seconds, **arguments), as perf.launch.process has them;
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
                wrong = image_check.wrong(answer["image"], precision, device, slot.configuration.approximate)
                if slot.configuration.workload != "text":  # whose input is the same in every round
                    wrong = wrong or image_check.repeated(hashes)
                # What is wrong with a picture is in its own event: a kill cannot come between the two.
                content = {"round": number, "attempt": attempt, "answer": answer, "wrong": wrong}
                content.update(telemetry=watched.telemetry, invalid=watched.invalid)
                self._note("round", measured, launch, content)
