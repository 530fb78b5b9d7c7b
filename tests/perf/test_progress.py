"""Progress output: lines, the bar on a terminal, and the remaining time."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from perf.configurations.configuration import Configuration
from perf.session.plan import WARM_UP_ROUND, Plan, Slot
from perf.session.progress import COLD_COMPILE_SECONDS, SessionProgress

A, B = Slot(Configuration(attention="original")), Slot(Configuration(attention="mha"))


class Watched:
    """A progress with a manual clock and captured output."""

    def __init__(self, plan: Plan | None, terminal: bool = False):
        self.now, self.output = 0.0, io.StringIO()
        console = Console(file=self.output, force_terminal=terminal, width=200)
        self.progress = SessionProgress(console, clock=lambda: self.now)
        if plan:
            self.progress.plan(plan.turns(), plan.rounds)

    def step(self, launch: int, slot: Slot, number: int | None, at: float) -> float | None:
        self.now = at
        self.progress(launch, slot, number)
        return self.progress.seconds_left()

    @property
    def lines(self) -> list[str]:
        return self.output.getvalue().splitlines()


def test_remaining_time_is_that_of_loads_and_rounds_of_each_slot():
    watched = Watched(Plan((A, B), launches=2, rounds=2, loading="all"))
    assert watched.step(0, A, None, 0.0) is None
    assert watched.step(0, B, None, 5.0) == pytest.approx(3 * 5)  # loads; of a round nothing is known
    watched.step(0, A, 0, 12.0)
    assert watched.step(0, B, 0, 13.0) == pytest.approx(5 + 7 + 2 * 1 + 3 * 1 + 2 * 1)
    assert watched.step(0, B, 1, 16.0) == pytest.approx(5 + 7 + 3 * 3 + 3 * 1)


@pytest.mark.parametrize(
    "options", [{"compile": "default"}, {"optimise": "fast"}, {"optimise": "compile_step"}, {"optimise": "freezing"}]
)
def test_the_first_compilation_is_counted_before_it_is_measured(options):
    """In the order of the runner: all slots load, then all warm up, then rounds alternate."""
    compiled = Slot(Configuration(**options))
    watched = Watched(Plan((A, compiled), launches=3, rounds=1, loading="all"))
    watched.step(0, A, None, 0.0)
    left = watched.step(0, compiled, None, 4.0)
    assert left == pytest.approx(5 * 4 + COLD_COMPILE_SECONDS)
    watched.step(0, A, WARM_UP_ROUND, 8.0)
    watched.step(0, compiled, WARM_UP_ROUND, 9.0)
    left = watched.step(0, A, 0, 69.0)  # after a cold compilation of 60 s; the later ones are warm
    assert left == pytest.approx(4 * 4 + 4 * 1)


def test_resumed_sessions_skip_measured_launches():
    watched = Watched(Plan((A, B), launches=3, rounds=1, loading="all"), terminal=True)
    assert watched.step(2, A, None, 5.0) is None
    assert watched.step(2, B, None, 15.0) == pytest.approx(10)
    task = watched.progress.bar.tasks[0]
    assert (task.completed, task.total) == (13, 18)


def test_further_launches_are_added():
    plan = Plan((A, B), launches=1, rounds=1, looks=(1, 2))
    watched = Watched(plan)
    watched.step(0, A, None, 0.0)
    watched.step(0, A, 0, 10.0)
    watched.progress.plan(Plan((A,), launches=2, rounds=1).turns(1, 2), 1)
    assert watched.step(1, A, None, 12.0) == pytest.approx(10 + 2)


def test_further_rounds_of_earlier_launches_are_expected_in_later_ones():
    watched = Watched(Plan((A,), launches=3, rounds=2, most_rounds=9))
    watched.step(0, A, None, 0.0)
    watched.step(0, A, WARM_UP_ROUND, 10.0)
    for number in range(6):
        watched.step(0, A, number, 11.0 + number)
    left = watched.step(1, A, None, 17.0)
    assert left == pytest.approx(2 * (10 + 1 + 6 * 1))
    assert watched.lines[-1] == "perf: launch 2, about 34 s left"
    watched.step(1, A, WARM_UP_ROUND, 27.0)
    for number in range(2):
        watched.step(1, A, number, 28.0 + number)
    assert watched.step(2, A, None, 30.0) == pytest.approx(10 + 1 + 4 * 1)


def test_an_unplanned_step_is_no_error():
    watched = Watched(None)
    watched.step(0, A, None, 0.0)
    assert watched.step(1, A, None, 10.0) == pytest.approx(10)


def test_without_a_terminal_every_launch_prints_a_line():
    watched = Watched(Plan((A, B), launches=2, rounds=1, loading="all"))
    with watched.progress:
        watched.step(0, A, None, 0.0)
        watched.step(0, B, None, 30.0)
        watched.step(0, A, 0, 60.0)
        watched.step(0, B, 0, 61.0)
        watched.step(1, B, None, 62.0)
        watched.progress.log("perf: [red]words[/red] with " + "x" * 300)
    assert watched.lines == [
        "perf: launch 1",
        "perf: launch 2, about 62 s left",
        "perf: [red]words[/red] with " + "x" * 300,
    ]


def test_a_terminal_shows_a_transient_bar():
    watched = Watched(Plan((A,), launches=2, rounds=1), terminal=True)
    with watched.progress:
        watched.step(0, A, None, 0.0)
        watched.step(0, A, 0, 10.0)
        watched.progress.bar.refresh()
        shown = watched.output.getvalue()
    assert A.name in shown and "1/6" in shown and "left" in shown
    assert "launch 1" not in shown
    assert watched.progress.bar.finished is False
