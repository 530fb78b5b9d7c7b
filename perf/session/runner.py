"""The measuring protocol: launches with timed, checked rounds that alternate between the configurations.

    launch 0: load A B C; rounds C A B, A C B, ...; launch 1: load B C A; rounds ...

A launch is a fresh process that loads the model and runs one warm-up round before the timed ones. Slots that are loaded
together alternate round by round in an order that is drawn anew for each cycle, which exposes all of them to the same
state of the machine and spreads the effect of one on the next. Only one worker runs a round at a time; models are loaded
at the same time, except in the first launch, whose times of loading are those that a session reports.
The module is pure: processes, telemetry and the journal are passed in.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
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
    release: float = 60.0


@dataclass
class Runner:
    """Runs a plan.

    open_launch(slot): context of a worker with `pid`, send(operation, **arguments), receive(timeout_seconds) and `ask`, which
    does both.
    load(slot): arguments of the worker's `load`. references(slot, seed): files of the reference images, or None.
    watch(pid): context with `telemetry` and `invalid` (a reason or None) once it has exited.
    write(event, content): stores a journal event. progress(launch, slot, round): called when a launch starts to load
    (round None), and before its warm-up (WARM_UP_ROUND) and each timed round. loaded(pid): called with the process of
    each launch, before any is timed.
    counting: whether the first launch counts the operators of an untimed round. loads_at_once: the number of workers that
    load at the same time. settled(measurements, launch, slots): whether a launch of slots that alternate needs no more than
    the planned rounds.
    """

    plan: Plan
    open_launch: Callable[[Slot], AbstractContextManager[Any]]
    load: Callable[[Slot], dict[str, Any]]
    references: Callable[[Slot, int], list[str] | None]
    watch: Callable[[int], AbstractContextManager[Any]]
    write: Callable[[str, dict[str, Any]], None]
    progress: Callable[[int, Slot, int | None], None]
    limits: Limits = Limits()
    loaded: Callable[[int], None] = lambda pid: None
    counting: bool = False
    loads_at_once: int = 1
    settled: Callable[[Measurements, int, Sequence[Slot]], bool] = lambda measurements, launch, slots: True

    def run(self, measurements: Measurements, first: int = 0, last: int | None = None) -> None:
        """Measure the missing rounds of the launches from `first` up to, but without, `last` (default: all)."""
        for launch, slots in self.plan.turns(first, last):
            incomplete = functools.partial(self._incomplete, measurements, launch, slots)
            with contextlib.ExitStack() as stack:
                self._run_together(launch, incomplete, stack)

    def _run_together(
        self, launch: int, incomplete: Callable[[], Sequence[SlotMeasurements]], stack: contextlib.ExitStack
    ) -> None:
        """Load all slots, then run cycles until no slot needs a round; a failed slot leaves the others."""
        opened = [
            (measured, stack.enter_context(contextlib.closing(self._launch(launch, measured))))
            for measured in incomplete()
        ]
        running: list[tuple[SlotMeasurements, Iterator[None]]] = []
        for group in self._loading_groups(launch, opened):
            loading = [pair for pair in group if self._advance(launch, *pair)]
            running += [pair for pair in loading if self._advance(launch, *pair)]
        running = [pair for pair in running if self._advance(launch, *pair)]  # one warms up at a time
        for cycle in range(self.plan.cycles):
            if cycle >= self.plan.rounds and not incomplete():
                return
            for measured, rounds in self.plan.shuffled(running, launch, cycle):
                # A retry of an invalid round stays within its cycle, and so does what a resumed launch lacks.
                while measured.failure is None and measured.next_round(launch)[0] <= cycle:
                    if not self._advance(launch, measured, rounds):
                        break

    def _loading_groups(
        self, launch: int, opened: Sequence[tuple[SlotMeasurements, Iterator[None]]]
    ) -> Iterator[list[tuple[SlotMeasurements, Iterator[None]]]]:
        """Slots that load at the same time. `fast` loads alone: it chooses by probes of the processor."""
        group: list[tuple[SlotMeasurements, Iterator[None]]] = []
        for pair in opened:
            alone = launch == 0 or pair[0].slot.configuration.preset == "fast"
            if group and (alone or len(group) == self.loads_at_once):
                yield group
                group = []
            group.append(pair)
            if alone:
                yield group
                group = []
        if group:
            yield group

    def _incomplete(self, measurements: Measurements, launch: int, slots: Sequence[Slot]) -> list[SlotMeasurements]:
        """The slots that need rounds in this launch.

        A launch that another one follows was settled when that began: what is known of its slots since then, such as a
        failure, must not add rounds of new processes to it.
        """
        group = [measurements.by_name[slot.name] for slot in slots]
        running = [measured for measured in group if measured.failure is None]
        made = {measured.slot.name: measured.next_round(launch)[0] for measured in running}
        followed = any(max(measured.launches, default=0) > launch for measured in group)
        whole = len(set(made.values())) == 1 and min(made.values()) >= self.plan.rounds
        settled = followed or (whole and self.settled(measurements, launch, slots))
        rounds = self.plan.rounds if settled else self.plan.cycles
        return [measured for measured in running if made[measured.slot.name] < rounds]

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
        """Begin to load, end it, and warm up, in a step each; then run one timed round a step."""
        slot = measured.slot
        self.progress(launch, slot, None)
        with contextlib.ExitStack() as stack:
            worker = stack.enter_context(self.open_launch(slot))
            self.loaded(worker.pid)
            worker.send("load", **self.load(slot))
            yield
            loaded = worker.receive(self.limits.load)
            if loaded.get("releases"):
                stack.callback(_release, worker, self.limits.release)
            self._require_same_choice(measured, loaded)
            self._record("load", measured, launch, {"answer": loaded})
            yield
            self.progress(launch, slot, WARM_UP_ROUND)
            answer, _ = run_round(worker, self.limits.first_round, slot.seed(WARM_UP_ROUND))
            hashes = [answer["image"]["sha256"]]
            self._record("round", measured, launch, {"round": None, "answer": answer})
            if self.counting and launch == 0 and measured.counts is None:
                self._count(worker, measured, launch)
            while measured.failure is None and measured.next_round(launch)[0] < self.plan.cycles:
                yield
                number, attempt = measured.next_round(launch)
                self.progress(launch, slot, number)
                seed = slot.seed(number)
                check = self.references(slot, seed) if number == 0 else None
                answer, watched = run_round(worker, self.limits.round, seed, check, self.watch)
                if attempt == 0:  # a retry has the same latents as the round it repeats, and so the same image
                    hashes.append(answer["image"]["sha256"])
                wrong = self._image_failure(slot, loaded, answer["image"], hashes)
                # One event holds the round and its image check, so that a kill cannot separate them.
                content = {"round": number, "attempt": attempt, "answer": answer, "wrong": wrong}
                content.update(telemetry=watched.telemetry, invalid=watched.invalid)
                self._record("round", measured, launch, content)

    def _count(self, worker: Any, measured: SlotMeasurements, launch: int) -> None:
        """Record the counts of an untimed round, or why it cannot be counted, which does not affect the timed rounds."""
        try:
            counts = worker.ask("count", self.limits.first_round, seed=measured.slot.seed(WARM_UP_ROUND))
        except WorkerError as error:
            if error.kind != "failed":  # the process or its model is gone
                raise
            counts = {
                **dict.fromkeys(("operators", "bytes", "host_waits", "generated_kernels")),
                "error": str(error)[:300],
            }
        self._record("counts", measured, launch, {"answer": counts})

    @staticmethod
    def _require_same_choice(measured: SlotMeasurements, loaded: dict[str, Any]) -> None:
        """Raise WorkerError if `fast` chose something else than in an earlier launch: their times would be mixed."""
        launches = measured.ordered_launches()
        ways_out = {
            "precision": "fast,full or fast,bf16",
            "layers": "fast,packed, fast,avx2_layers or fast,avx512_layers",
        }
        for name, choices in ways_out.items():
            now = loaded.get(name)
            before = launches[0].load.get(name) if launches else now
            if before != now and None not in (before, now):  # an engine of another version may not say
                raise WorkerError(
                    "failed",
                    f"this launch loaded {name} {now}, an earlier one {before}: other programs disturbed the probe of the "
                    f"processor; choose one, for example --optimise {choices}",
                )

    def _image_failure(
        self, slot: Slot, loaded: dict[str, Any], image: dict[str, Any], hashes: list[str]
    ) -> str | None:
        configuration, device = slot.configuration, loaded["facts"]["device"]
        failure = image_check.image_failure(
            image, loaded["precision"], device, configuration.approximate, configuration.workload, configuration.own
        )
        # The text workload has the same input in every round, and so may an engine of the user's own.
        if failure or configuration.workload == "text" or configuration.own:
            return failure
        return image_check.repeated_output(hashes)


def run_round(
    worker: Any,
    seconds: float,
    seed: int,
    check: list[str] | None = None,
    watch: Callable[[int], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> tuple[dict[str, Any], Any]:
    """(the worker's answers about one round, what `watch` observed during the round itself). seconds: limit of each answer."""
    worker.ask("prepare", seconds, seed=seed)
    with watch(worker.pid) as watched:
        answer = worker.ask("round", seconds, seed=seed)
    return {**answer, **worker.ask("examine", seconds, check=check)}, watched


def _release(worker: Any, seconds: float) -> None:
    """Let an engine release what it holds; an error has no effect on what was measured."""
    with contextlib.suppress(WorkerError):
        worker.ask("release", seconds)
