"""Resumed sessions: equal measurements, and rejection of other plans."""

from __future__ import annotations

import dataclasses
import random
from functools import partial

import pytest
from protocol_bench import THREE, WRONG, A, B, Bench, C, Stopped, result, wrong

from perf.configurations.configuration import Configuration
from perf.session.measurements import Measurements
from perf.session.pairs import Judge, further_plan, pairs_of
from perf.session.plan import CONTROL, Plan, Slot


def _cases():
    plan = Plan((*THREE[:2], Slot(A, "aa")), launches=3, rounds=2)
    bad = {(A.id, 0, 1): 2, (B.id, 1, 1001): 9, (f"{A.id}@aa", 2, 1001): 4}
    return {
        "plain": (plan, {"noise": 0.01}, {}),
        "invalid rounds": (plan, {"noise": 0.01}, bad),
        "a wrong picture": (plan, wrong(WRONG["constant"], seed=1001), {}),
        "side by side": (dataclasses.replace(plan, loading="all", seed=4), {"noise": 0.01}, bad),
        "noisy rounds": (dataclasses.replace(plan, loading="all", seed=4, most_rounds=5), {"noise": 0.02}, bad),
        "unavailable": (plan, {"at": [{"op": "load", "id": B.id, "do": "error", "kind": "unavailable"}]}, {}),
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", _cases())
def test_resumed_sessions_measure_the_same_as_uninterrupted_ones(case):
    """Interrupted after every event, and 30 times at random moments repeatedly until complete."""
    plan, script, bad = _cases()[case]
    settled = Judge(plan, pairs_of(plan, "aa", lambda id: "itself"), 0.01).settled
    make = partial(Bench, plan, script, bad=bad, settled=settled)
    whole = make()
    measurements = whole.run()
    expected = result(measurements)
    most = max(len(launch.rounds) for launch in measurements.by_name[A.id].ordered_launches())
    assert most > plan.rounds if plan.most_rounds else most == plan.rounds
    assert result(Measurements(plan, whole.events)) == expected
    again = make(events=whole.events)
    again.run()
    assert again.turns == [] and again.asked == []  # nothing is measured twice
    for cut in range(len(whole.events) + 1):
        assert result(make(events=whole.events[:cut]).run()) == expected, f"cut after {cut} events"
    for seed in range(30):
        draw, events, finished = random.Random(seed), [], False
        while not finished:
            bench = make(events=events, kill_after=len(events) + draw.randrange(3, 12))
            try:
                measurements = bench.run()
                finished = True
            except Stopped:
                pass
            events = bench.events
        assert result(measurements) == expected, f"seed {seed}"


def test_a_launch_that_another_follows_gets_no_rounds_of_new_processes():
    """Whatever is known of its slots by then: they may have failed, or have been decided."""
    plan = Plan((Slot(A), Slot(A, "aa")), launches=3, rounds=2, loading="all", most_rounds=4)
    whole = Bench(plan)
    whole.run()
    resumed = Bench(plan, events=whole.events, settled=lambda measurements, launch, slots: False)
    measurements = resumed.run()
    assert {launch for launch, _ in resumed.turns} == {2}
    assert [len(launch.rounds) for launch in measurements.by_name[A.id].ordered_launches()] == [2, 2, 4]


def test_rounds_settle_the_pairs_and_the_control_arm_that_alternate(monkeypatch):
    slots = (Slot(A), Slot(A, "base"), Slot(A, CONTROL), Slot(B), Slot(B, "base"))
    plan, asked = Plan(slots, launches=1, rounds=3, loading="all"), []
    bench = Bench(plan, errors={(f"{B.id}@base", 0): ("round", "died")})
    measurements = bench.run()
    monkeypatch.setattr("perf.session.pairs.is_settled", lambda sides: asked.append(len(sides)) or asked)
    judge = Judge(plan, pairs_of(plan, "base", lambda id: "v1"), 0.01)
    assert judge.settled(measurements, 0, slots) is asked  # not the pair that failed
    judge.settled(measurements, 0, slots[:2])
    judge.settled(measurements, 0, slots[:1])
    assert asked == [2, 1, 0]


def test_further_launches_are_those_of_undecided_pairs_and_the_control_arm():
    slots = (Slot(A), Slot(A, "base"), Slot(A, CONTROL), Slot(B), Slot(B, "base"), Slot(C), Slot(C, "base"))
    plan = Plan(slots, launches=3, rounds=1, loading="all", looks=(3, 5))
    judge = Judge(plan, pairs_of(plan, "base", lambda id: "v1"), 0.01)
    further = further_plan(plan, judge, [B.id])
    assert [slot.name for slot in further.slots] == [A.id, f"{A.id}@{CONTROL}", B.id, f"{B.id}@base"]
    bench = Bench(plan)
    bench.run()
    measurements = bench.run(further, 3, 5)
    assert sorted(measurements.by_name[B.id].launches) == [0, 1, 2, 3, 4]
    assert sorted(measurements.by_name[f"{A.id}@base"].launches) == [0, 1, 2]
    assert result(Measurements(plan, bench.events)) == result(measurements)


@pytest.mark.parametrize(
    "change",
    [
        {"slot": "another"},
        {"slot": None},
        {"launch": -1},
        {"launch": 3},  # more than the last look
        {"launch": "0"},
        {"launch": 1},  # which was not loaded
    ],
)
def test_events_of_another_plan_are_rejected(change):
    plan = Plan(THREE, launches=2, rounds=1, looks=(2, 3))
    bench = Bench(plan)
    bench.run()
    events = [event for event in bench.events if event["launch"] == 0]
    with pytest.raises(ValueError, match=r"no slot of this plan|never loaded"):
        Measurements(plan, [*events, {**events[1], **change}])


def test_different_plans_have_different_dicts():
    plan = Plan(THREE, launches=2, rounds=1)
    same_name = Configuration(attention="original", steps=2, prompt="Another photo")
    others = [
        Plan(THREE[:2], 2, 1),
        Plan(THREE[::-1], 2, 1),
        Plan(THREE, 3, 1),
        Plan(THREE, 2, 2),
        Plan(THREE, 2, 1, looks=(2, 4)),
        Plan(THREE, 2, 1, most_rounds=2),
        Plan((*THREE[:2], Slot(C, "aa")), 2, 1),
        Plan((Slot(same_name), *THREE[1:]), 2, 1),
    ]
    assert same_name.id == A.id
    assert all(other.as_dict() != plan.as_dict() for other in others)


def test_failure_kinds_of_earlier_versions_are_read():
    plan = Plan(THREE, launches=1, rounds=1)
    event = {"event": "failure", "slot": A.id, "launch": 0, "message": "x"}
    assert Measurements(plan, [{**event, "kind": "wrong_picture"}]).by_name[A.id].failure == ("wrong_image", "x")
    assert Measurements(plan, [{**event, "kind": "rubbish"}]).by_name[A.id].failure is None  # retried
