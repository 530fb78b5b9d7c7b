"""Progress of a session on stderr: a bar with the remaining time on a terminal, one line per launch elsewhere."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from perf.session.plan import WARM_UP_ROUND, Slot

COLD_COMPILE_SECONDS = 40.0  # assumed for a first torch.compile until one was measured: the embedded model on two cores


class SessionProgress:
    """Counts loads, warm-ups and rounds, and estimates the remaining time from the mean duration of each slot's steps so far.

    The first warm-up of a compiled slot is a step of its own kind, because it compiles with a cold cache.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.console = console or Console(file=sys.stderr)
        self.compiled: dict[str, bool] = {}  # by slot name
        self.first_launch: dict[str, int] = {}
        self.pending: dict[tuple[int, str, int | None], None] = {}  # (launch, slot name, round or None for loading)
        self.durations: dict[tuple[str, str], list[float]] = {}  # by slot name and kind of step
        self.rounds = 0  # planned, of a launch
        self.timed: dict[str, Counter[int]] = {}  # rounds of each launch, by slot name
        self.total, self.launch = 0, -1
        self.current: tuple[str, str] | None = None
        self.since = clock()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            transient=True,
        )
        self.task = self.bar.add_task("starting", total=None, left="")

    def __enter__(self):
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.console.is_terminal:  # elsewhere it would print an empty line
            self.bar.stop()

    def plan(self, turns: Iterable[tuple[int, tuple[Slot, ...]]], rounds: int) -> None:
        """Add planned launches; those that are already measured, or whose slot fails, may be left out later."""
        self.rounds = rounds
        for launch, slots in turns:
            for slot in slots:
                # Other labels of a configuration share its compile cache, apart from the first of them.
                self.compiled[slot.name] = slot.configuration.compiles and slot.variant is None
                self.first_launch.setdefault(slot.name, launch)
                self.pending.update(
                    dict.fromkeys((launch, slot.name, step) for step in (None, WARM_UP_ROUND, *range(rounds)))
                )
        self.total = max(self.total, len(self.pending))

    def log(self, line: str) -> None:
        """Print a line that stays."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __call__(self, launch: int, slot: Slot, round_number: int | None) -> None:
        """Record that a step of a slot starts; the one before it has ended."""
        now = self.clock()
        if self.current is not None:
            self.durations.setdefault(self.current, []).append(now - self.since)
        self.current, self.since = (slot.name, self._kind(launch, slot.name, round_number)), now
        self.pending.pop((launch, slot.name, round_number), None)
        if round_number not in (None, WARM_UP_ROUND):
            self.timed.setdefault(slot.name, Counter())[launch] += 1
        begins, self.launch = launch != self.launch, launch
        if begins:  # what is left of earlier launches was measured before an interruption, or failed
            self.pending = {step: None for step in self.pending if step[0] >= launch}
        seconds = self.seconds_left()
        left = "" if seconds is None else f"about {_minutes(seconds)} left"
        if self.console.is_terminal:
            completed = self.total - len(self.pending) - 1
            self.bar.update(self.task, description=slot.name, total=self.total, completed=completed, left=left)
        elif begins:
            self.log(f"perf: launch {launch + 1}" + (f", {left}" if left else ""))

    def _kind(self, launch: int, name: str, round_number: int | None) -> str:
        if round_number is None:
            return "load"
        if round_number != WARM_UP_ROUND:
            return "round"
        return "first warm-up" if launch == self.first_launch.get(name) and self.compiled.get(name) else "warm-up"

    def seconds_left(self) -> float | None:
        """The estimated remaining seconds, including the current step; None before the first step has ended."""
        if not self.durations:
            return None
        steps = [(name, self._kind(launch, name, number)) for launch, name, number in self.pending]
        further = (
            self._further_rounds(name) * self._seconds((name, "round"))
            for _, name, number in self.pending
            if number == WARM_UP_ROUND
        )
        return sum(map(self._seconds, [*([self.current] if self.current else []), *steps])) + sum(further)

    def _further_rounds(self, name: str) -> float:
        """The mean of the rounds beyond the planned ones in the launches of a slot that have ended."""
        ended = [count for launch, count in self.timed.get(name, {}).items() if launch < self.launch]
        return max(0.0, statistics.fmean(ended) - self.rounds) if ended else 0.0

    def _seconds(self, step: tuple[str, str]) -> float:
        """The mean of a step, else that of its kind in other slots, else what is known of other steps."""
        if step in self.durations:
            return statistics.fmean(self.durations[step])
        same_kind = [seconds for (_, kind), values in self.durations.items() if kind == step[1] for seconds in values]
        if same_kind:
            return statistics.fmean(same_kind)
        if step[1] in ("round", "warm-up"):
            return 0.0
        if step[1] == "first warm-up":
            return COLD_COMPILE_SECONDS
        return statistics.fmean(itertools.chain.from_iterable(self.durations.values()))


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
