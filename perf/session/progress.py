"""Progress of a session on stderr: a bar with the remaining time on a terminal, one line per launch elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from perf.session.plan import Slot


class SessionProgress:
    """Counts launches. Estimates the remaining time from the mean duration of each configuration's launches so far.

    The first launch of a compiled configuration takes longer than the others, so that early estimates are too high.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.console = console or Console(file=sys.stderr)
        self.durations: dict[str, list[float]] = {}
        self.total = 0
        self.pending: list[tuple[int, str]] = []
        self.current, self.since = None, clock()
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

    def plan(self, turns: Iterable[tuple[int, tuple[Slot, ...]]]) -> None:
        """Add planned launches; those that are already measured, or whose slot fails, may be left out later."""
        launches = [(launch, slot.name) for launch, slots in turns for slot in slots]
        self.pending += launches
        self.total += len(launches)

    def log(self, line: str) -> None:
        """Print a line that stays."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __call__(self, launch: int, slot: Slot) -> None:
        """Record that a launch of a slot starts."""
        now = self.clock()
        if self.current is not None:
            self.durations.setdefault(self.current, []).append(now - self.since)
        self.current, self.since = slot.name, now
        if (launch, slot.name) in self.pending:
            del self.pending[: self.pending.index((launch, slot.name)) + 1]
        seconds = self.seconds_left()
        left = "" if seconds is None else f"{_minutes(seconds)} left"
        if self.console.is_terminal:
            completed = self.total - len(self.pending) - 1
            self.bar.update(self.task, description=slot.name, total=self.total, completed=completed, left=left)
        else:
            self.log(f"perf: launch {launch + 1}, {slot.name}" + (f", {left}" if left else ""))

    def seconds_left(self) -> float | None:
        """The estimated remaining seconds, including the current launch; None before the first launch has ended."""
        if not self.durations:
            return None
        all_durations = [seconds for durations in self.durations.values() for seconds in durations]
        default = sum(all_durations) / len(all_durations)
        mean = {name: sum(durations) / len(durations) for name, durations in self.durations.items()}
        return mean.get(self.current, default) + sum(mean.get(name, default) for _, name in self.pending)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
