"""Progress output: lines, the bar on a terminal, and the remaining time."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from perf.configurations.configuration import Configuration
from perf.session.plan import Plan, Slot
from perf.session.progress import SessionProgress

A, B = Slot(Configuration(attention="original")), Slot(Configuration(attention="mha"))


class Watched:
    """A progress with a manual clock and captured output."""

    def __init__(self, plan: Plan | None, terminal: bool = False):
        self.now, self.output = 0.0, io.StringIO()
        console = Console(file=self.output, force_terminal=terminal, width=200)
        self.progress = SessionProgress(console, clock=lambda: self.now)
        if plan:
            self.progress.plan(plan.turns())

    def launch(self, number: int, slot: Slot, at: float) -> float | None:
        self.now = at
        self.progress(number, slot)
        return self.progress.seconds_left()

    @property
    def lines(self) -> list[str]:
        return self.output.getvalue().splitlines()


def test_remaining_time_uses_the_mean_of_each_configuration():
    watched = Watched(Plan((A, B), launches=3, rounds=1))  # A B, B A, A B
    assert watched.launch(0, A, 0.0) is None
    assert watched.launch(0, B, 10.0) == pytest.approx(6 * 10 - 10)  # all as long as the first
    assert watched.launch(1, B, 110.0) == pytest.approx(2 * 100 + 2 * 10)
    assert watched.launch(1, A, 190.0) == pytest.approx(2 * 10 + 90)
    assert watched.launch(2, A, 220.0) == pytest.approx(20 + 90)
    assert watched.launch(2, B, 240.0) == pytest.approx(90)


def test_resumed_sessions_skip_measured_launches():
    watched = Watched(Plan((A, B), launches=3, rounds=1), terminal=True)
    assert watched.launch(1, A, 5.0) is None
    assert watched.launch(2, A, 15.0) == pytest.approx(2 * 10)
    task = watched.progress.bar.tasks[0]
    assert (task.completed, task.total) == (4, 6)


def test_launches_of_a_failed_configuration_are_skipped():
    watched = Watched(Plan((A, B), launches=3, rounds=1))
    watched.launch(0, A, 0.0)
    watched.launch(0, B, 10.0)  # which fails in a second
    assert watched.launch(1, A, 11.0) == pytest.approx(10 + 10 + 1)
    assert watched.launch(2, A, 21.0) == pytest.approx(10 + 1)


def test_a_doubled_plan_is_added():
    plan = Plan((A, B), launches=1, rounds=1)
    watched = Watched(plan, terminal=True)
    watched.launch(0, A, 0.0)
    watched.launch(0, B, 10.0)
    watched.progress.plan(plan.doubled([B.name]).turns(1))
    assert watched.launch(1, B, 30.0) == pytest.approx(20)
    task = watched.progress.bar.tasks[0]
    assert (task.completed, task.total, task.description) == (2, 3, B.name)


def test_an_unplanned_launch_is_no_error():
    watched = Watched(None)
    watched.launch(0, A, 0.0)
    assert watched.launch(1, A, 10.0) == pytest.approx(10)


def test_without_a_terminal_every_launch_prints_a_line():
    watched = Watched(Plan((A, B), launches=2, rounds=1))
    with watched.progress:
        watched.launch(0, A, 0.0)
        watched.launch(0, B, 30.0)
        watched.launch(1, B, 330.0)
        watched.progress.log("perf: [red]words[/red] with " + "x" * 300)
    assert watched.lines == [
        f"perf: launch 1, {A.name}",
        f"perf: launch 1, {B.name}, 2 min left",
        f"perf: launch 2, {B.name}, 6 min left",
        "perf: [red]words[/red] with " + "x" * 300,
    ]


def test_seconds_are_shown_below_a_minute_and_a_half():
    watched = Watched(Plan((A,), launches=9, rounds=1))
    for number, at in enumerate([0, 11, 22]):
        watched.launch(number, A, at)
    assert [line.rpartition(", ")[2] for line in watched.lines[1:]] == ["88 s left", "77 s left"]


def test_a_terminal_shows_a_transient_bar():
    watched = Watched(Plan((A,), launches=2, rounds=1), terminal=True)
    with watched.progress:
        watched.launch(0, A, 0.0)
        watched.launch(1, A, 10.0)
        watched.progress.bar.refresh()
        shown = watched.output.getvalue()
    assert A.name in shown and "1/2" in shown and "10 s left" in shown
    assert "launch 1," not in shown
    assert watched.progress.bar.finished is False
