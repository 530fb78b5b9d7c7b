"""What a person sees while a session runs: a bar with the time left on a terminal, a line a launch elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class SessionProgress:
    """Counts launches. The time left is that of the launches so far, each configuration by its own mean.

    A compiled configuration's first launch is not like its others, so that the first estimate is too long rather than
    too short.
    """

    def __init__(self, console: Console | None = None, clock=time.monotonic):
        self.clock = clock
        self.console = console or Console(file=sys.stderr)
        self.taken: dict[str, list[float]] = {}
        self.total = 0
        self.to_come: list[tuple[int, str]] = []
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

    def plan(self, turns) -> None:
        """Which launches are to come, after those planned before; some may be left out, as measured already or failed."""
        turns = [(launch, slot.name) for launch, slots in turns for slot in slots]
        self.to_come += turns
        self.total += len(turns)

    def say(self, words: str) -> None:
        """One line that stays."""
        self.console.print(words, markup=False, highlight=False, soft_wrap=True)

    def __call__(self, launch: int, slot) -> None:
        """A launch of a slot starts."""
        now = self.clock()
        if self.current is not None:
            self.taken.setdefault(self.current, []).append(now - self.since)
        self.current, self.since = slot.name, now
        if (launch, slot.name) in self.to_come:
            del self.to_come[: self.to_come.index((launch, slot.name)) + 1]
        left = self.seconds_left()
        words = "" if left is None else f"{_minutes(left)} left"
        if self.console.is_terminal:
            done = self.total - len(self.to_come) - 1
            self.bar.update(self.task, description=slot.name, total=self.total, completed=done, left=words)
        else:
            self.say(f"perf: launch {launch + 1}, {slot.name}" + (f", {words}" if words else ""))

    def seconds_left(self) -> float | None:
        """An estimate, with the launch that has just started; None before the first one has ended."""
        if not self.taken:
            return None
        everything = [seconds for times in self.taken.values() for seconds in times]
        usual = sum(everything) / len(everything)
        mean = {name: sum(times) / len(times) for name, times in self.taken.items()}
        return mean.get(self.current, usual) + sum(mean.get(name, usual) for _, name in self.to_come)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
