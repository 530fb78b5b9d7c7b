"""The order of turns, what is kept of each round, and that going on gives what would have been measured without a break."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from fake_worker import Fake

from perf import protocol
from perf.configurations import Configuration
from perf.launcher import WorkerError, read_answer
from perf.protocol import Limits, Measurements, Plan, Runner, Slot

A = Configuration(attention="original", steps=2)
B = Configuration(attention="mha", steps=2)
C = Configuration(attention="sdpa", steps=2)
THREE = tuple(map(Slot, (A, B, C)))


class Stopped(BaseException):
    """A kill of the runner, as far as one process can have it."""


class Bench:
    """A machine on which launches cost nothing: the fake worker in this process, deterministic by slot, launch and round.

    bad: {(slot name, launch, seed): how many times in a row the watch says that the round is invalid}. kill_after: events
    after which the runner is stopped. errors: {(slot name, launch): (operation, kind)}.
    """

    def __init__(self, plan: Plan, script: dict | None = None, events=(), bad=None, kill_after=None, errors=None):
        self.plan, self.script = plan, script or {"noise": 0.01}
        self.events, self.turns, self.asked = list(events), [], []
        self.bad, self.kill_after, self.errors = dict(bad or {}), kill_after, dict(errors or {})
        self.tries: dict = {}
        for event in self.events:  # what the watch has said already
            if event["event"] == "round" and event["round"] is not None:
                self._try(event["slot"], event["launch"], event["answer"]["seed"])

    def _try(self, *key) -> int:
        self.tries[key] = self.tries.get(key, 0) + 1
        return self.tries[key]

    def run(self, plan: Plan | None = None, first: int = 0) -> Measurements:
        measurements = Measurements(self.plan, copy.deepcopy(self.events))
        runner = Runner(
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
            progress=lambda launch, slot: self.turns.append((launch, slot.name)),
            limits=Limits(1, 2, 3),
        )
        runner.run(measurements, first)
        return measurements

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

    def ask(self, operation: str, timeout_seconds: float, **arguments) -> dict:
        failing = self.bench.errors.get((self.slot.name, self.launch))
        if failing and failing[0] == operation:
            raise WorkerError(failing[1], "so the test says")
        answer = read_answer(self.fake.handle({"op": operation, **arguments}))
        if operation == "round":
            self.bench.asked.append((self.slot.name, self.launch, arguments["seed"]))
            order = self.bench.plan.slots.index(self.slot)
            answer.update(
                seed=arguments["seed"], started_unix_seconds=1000.0 * self.launch + order + arguments["seed"] / 1e6
            )
        return answer


def seeds(count: int) -> list[int]:
    return [1 + protocol.ROUND_APART * number for number in range(count)]


def result(measurements: Measurements) -> dict:
    """All that the rest reads."""
    return {
        "slots": {
            name: {
                "failure": one.failure,
                "thrown_away": one.thrown_away,
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


def test_turns_are_mirrored_every_other_launch():
    bench = Bench(Plan(THREE, launches=3, rounds=2))
    measurements = bench.run()
    a, b, c = (slot.name for slot in THREE)
    assert bench.turns == [(0, a), (0, b), (0, c), (1, c), (1, b), (1, a), (2, a), (2, b), (2, c)]
    assert [len(measurements.by_name[name].rounds()) for name in (a, b, c)] == [6, 6, 6]
    assert measurements.counts() == (0, 18)


def test_side_by_side_the_variants_of_a_configuration_take_turns_round_by_round():
    slots = (Slot(A), Slot(A, "aa"), Slot(B), Slot(B, "aa"))
    bench = Bench(Plan(slots, launches=2, rounds=3, side_by_side=True))
    alive = []
    opened = bench.open

    @contextlib.contextmanager
    def counting(slot):
        alive.append(slot.name)
        with opened(slot) as worker:
            yield worker
        alive.remove(slot.name)

    bench.open = counting
    asked = []
    bench.watch = lambda pid: contextlib.nullcontext(SimpleNamespace(telemetry=None, invalid=None))
    bench.write = lambda event, content, keep=bench.write: (
        asked.append((sorted(alive), content)),
        keep(event, content),
    )
    measurements = bench.run()
    a, aa, b, bb = (slot.name for slot in slots)
    assert bench.turns == [(0, a), (0, aa), (0, b), (0, bb), (1, bb), (1, b), (1, aa), (1, a)]
    timed = [
        name for name, launch, seed in bench.asked if launch == 0 and seed < protocol.ROUND_APART * protocol.WARM_UP
    ]
    assert timed == [aa, a, a, aa, aa, a, bb, b, b, bb, bb, b]
    seeds_of_a = [seed for name, launch, seed in bench.asked if (name, launch) == (a, 0)]
    assert seeds_of_a[1:] == seeds(3)
    assert all(set(names) <= {a, aa} or set(names) <= {b, bb} for names, _ in asked)
    assert alive == []
    assert [len(measurements.by_name[slot.name].rounds()) for slot in slots] == [6] * 4


@pytest.mark.parametrize("operation", ["load", "round"])
def test_side_by_side_a_failure_leaves_the_other_one(operation):
    slots = (Slot(A), Slot(A, "base"))
    bench = Bench(
        Plan(slots, launches=2, rounds=3, side_by_side=True), errors={(f"{A.id}@base", 0): (operation, "died")}
    )
    measurements = bench.run()
    assert measurements.by_name[f"{A.id}@base"].failure == ("died", "so the test says")
    assert len(measurements.by_name[A.id].rounds()) == 6
    assert len(Bench(bench.plan, events=bench.events).run().by_name[f"{A.id}@base"].rounds()) == 6


def test_a_launch_is_a_load_a_warm_up_and_rounds_with_latents_of_their_own():
    bench = Bench(Plan(THREE[:1], launches=2, rounds=3))
    measured = bench.run().by_name[A.id]
    warm_up = 1 + protocol.ROUND_APART * protocol.WARM_UP
    assert [seed for _, launch, seed in bench.asked if launch == 1] == [warm_up, *seeds(3)]
    assert [event["event"] for event in bench.events] == 2 * ["load", "round", "round", "round", "round"]
    assert [event["round"] for event in bench.events[1:5]] == [None, 0, 1, 2]
    first = bench.events[1]["answer"]["wall_seconds"]
    assert measured.launches[0].first_call_seconds == first
    assert first not in [one["seconds"] for one in measured.launches[0].rounds]


@pytest.mark.parametrize("times", range(protocol.RETRIES + 2))
def test_an_invalid_round_is_repeated_and_then_kept_as_invalid(times):
    plan = Plan(THREE[:1], launches=1, rounds=3)
    bench = Bench(plan, bad={(A.id, 0, seeds(3)[1]): times})
    measurements = bench.run()
    launch = measurements.by_name[A.id].launches[0]
    stayed = times > protocol.RETRIES
    assert [seed for _, _, seed in bench.asked].count(seeds(3)[1]) == min(times, protocol.RETRIES) + 1
    assert [one["round"] for one in launch.rounds] == [0, 1, 2]
    assert [one["invalid"] for one in launch.rounds] == [None, "throttled" if stayed else None, None]
    assert len(launch.valid()) == 3 - stayed
    assert measurements.counts() == (min(times, protocol.RETRIES + 1), min(times, protocol.RETRIES + 1) + 3 - stayed)


def test_more_than_a_fifth_invalid_is_an_invalid_session():
    plan = Plan(THREE[:1], launches=1, rounds=8)
    of_ten = Bench(plan, bad=dict.fromkeys([(A.id, 0, seed) for seed in seeds(2)], 1)).run()
    assert (of_ten.counts(), of_ten.invalid()) == ((2, 10), None)
    of_eleven = Bench(plan, bad=dict.fromkeys([(A.id, 0, seed) for seed in seeds(3)], 1)).run()
    assert of_eleven.counts() == (3, 11)
    assert of_eleven.invalid() == "invalid_rounds 27 %, 20 % allowed"
    nothing = Bench(Plan(THREE[:1], launches=1, rounds=1), bad={(A.id, 0, 1): 99}).run()
    assert nothing.by_name[A.id].median(0) is None
    assert nothing.invalid() == "invalid_rounds 100 %, 20 % allowed"


def drifting(factors, rounds: int = 1, slots=THREE, anchors=None) -> Measurements:
    """A session in which launch n has its anchor multiplied by factors[n]."""
    plan = Plan(slots, launches=len(factors), rounds=rounds)
    bench = Bench(plan)
    bench.run()
    for event in bench.events:
        if event["event"] == "round":
            own = (anchors or {}).get(event["slot"], 0.001)
            event["answer"]["anchor_seconds"] = own * factors[event["launch"]]
    return Measurements(plan, bench.events)


@pytest.mark.parametrize(
    "factors, drift",
    [
        ([1, 1, 1], 0.0),
        ([1, 1, 1.029], 0.029),
        ([1.031, 1, 1], 0.031),
        ([1, 0.96, 1], 0.04),
        ([1, 1, 0.9], 0.1),
        ([1] * 8 + [1.5], 0.0),  # a moment is no drift: medians
    ],
)
def test_an_anchor_that_moved_makes_the_session_invalid(factors, drift):
    measurements = drifting(factors)
    assert measurements.drift() == pytest.approx(drift, abs=1e-9)
    said = measurements.invalid()
    assert (said is not None) == (drift > 0.03)
    assert drifting([1, 2], slots=THREE[:1]).drift() is None  # too few rounds
    assert said is None or said == f"anchor_drift {100 * drift:.1f} %, 3 % allowed"


def test_another_interpreter_with_another_anchor_is_no_drift():
    """Which part of the session each has is chance, and all of it in a doubled plan's second half."""
    old = Configuration(attention="original", steps=2, interpreter="torch112")
    for slots in ((A, old), (A, B, old), (old, A, B)):
        for rounds in (1, 2, 3, 5):
            measured = drifting([1] * 6, rounds, tuple(map(Slot, slots)), {old.id: 0.0015})
            assert measured.drift() == pytest.approx(0, abs=1e-12), (slots, rounds)
    moved = drifting([1, 1, 1.05], 3, (Slot(A), Slot(old)), {old.id: 0.0015})
    assert moved.drift() == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize(
    "kind", ["died", "hung", "rubbish", "failed", "out_of_memory", "unavailable", "usage", "bad_image"]
)
@pytest.mark.parametrize("operation", ["load", "round"])
def test_a_failure_stops_its_slot_and_leaves_the_others(kind, operation):
    plan = Plan(THREE, launches=3, rounds=2)
    bench = Bench(plan, errors={(B.id, 1): (operation, kind)})
    measurements = bench.run()
    assert measurements.by_name[B.id].failure == (kind, "so the test says")
    assert [len(measurements.by_name[one.id].rounds()) for one in (A, B, C)] == [6, 2, 6]
    assert (2, B.id) not in bench.turns
    again = Bench(plan, events=bench.events)
    resumed = again.run()
    if kind in protocol.PASSING:  # may not happen again
        assert resumed.by_name[B.id].failure is None
        assert len(resumed.by_name[B.id].rounds()) == 6
        assert again.turns == [(1, B.id), (2, B.id)]
    else:
        assert resumed.by_name[B.id].failure == (kind, "so the test says")
        assert again.turns == []


WRONG = {
    "not_finite": {"finite": False},
    "constant": {"constant": True},
    "latents": {"latent_relative_error": 0.5, "psnr_db": 90.0},
    "picture": {"latent_relative_error": 0.0, "psnr_db": 10.0},
    "repeated_output": {"sha256": "the same"},
}


def wrong(image: dict, id: str = B.id, **when) -> dict:
    return {"noise": 0.01, "at": [{"op": "round", "id": id, "do": "change", "image": image, **when}]}


@pytest.mark.parametrize("code", WRONG)
def test_a_wrong_picture_stops_that_slot_only_and_stays_wrong(code):
    plan = Plan(THREE, launches=2, rounds=2)
    bench = Bench(plan, wrong(WRONG[code]))
    measurements = bench.run()
    kind, message = measurements.by_name[B.id].failure
    assert kind == "wrong_picture" and message.startswith(f"{code}: ")
    assert [len(measurements.by_name[one.id].rounds()) for one in (A, C)] == [4, 4]
    assert bench.turns.count((1, B.id)) == 0
    resumed = Bench(plan, events=bench.events).run()  # even by a worker that would be right now
    assert resumed.by_name[B.id].failure == (kind, message)


def test_a_wrong_picture_stays_wrong_when_the_runner_is_killed_at_once():
    plan = Plan(THREE[1:2], launches=1, rounds=2)
    whole = Bench(plan, wrong(WRONG["constant"], seed=1))
    expected = result(whole.run())
    assert expected["slots"][B.id]["failure"][0] == "wrong_picture"
    assert [event["event"] for event in whole.events] == ["load", "round", "round"]  # nothing comes after the picture
    for cut in range(len(whole.events) + 1):
        assert result(Bench(plan, whole.script, whole.events[:cut]).run()) == expected, cut


def test_a_cached_output_is_noticed_in_any_round_but_not_in_a_repetition():
    plan = Plan(THREE[1:2], launches=1, rounds=3)
    repeated = {"sha256": "7" * 64}
    script = wrong(repeated, nth=1)
    assert Bench(plan, script).run().by_name[B.id].failure is None
    script["at"].append({**script["at"][0], "nth": 3})
    assert Bench(plan, script).run().by_name[B.id].failure[1].startswith("repeated_output: ")
    assert Bench(plan, bad={(B.id, 0, seeds(2)[1]): 2}).run().by_name[B.id].failure is None
    text = Configuration(workload="text")  # whose input is the same in every round
    plan = Plan((Slot(text),), launches=1, rounds=3)
    assert Bench(plan, wrong(repeated, text.id)).run().by_name[text.id].failure is None


def test_only_the_first_round_of_a_launch_is_compared_and_all_requests_have_their_limit():
    asked = []

    class Recording(Asked):
        def ask(self, operation, timeout_seconds, **arguments):
            asked.append((operation, timeout_seconds, "check" in arguments and arguments["check"] is not None))
            return super().ask(operation, timeout_seconds, **arguments)

    bench = Bench(Plan(THREE[:1], launches=1, rounds=2))
    bench.open = lambda slot: contextlib.nullcontext(Recording(bench, slot, 0, Fake({})))
    bench.run()
    assert asked == [("load", 1, False), ("round", 2, False), ("round", 3, True), ("round", 3, False)]


def _cases():
    plan = Plan((*THREE[:2], Slot(A, "aa")), launches=3, rounds=2)
    bad = {(A.id, 0, 1): 2, (B.id, 1, 1001): 9, (f"{A.id}@aa", 2, 1001): 4}
    return {
        "plain": (plan, {"noise": 0.01}, {}),
        "invalid rounds": (plan, {"noise": 0.01}, bad),
        "a wrong picture": (plan, wrong(WRONG["constant"], seed=1001), {}),
        "side by side": (dataclasses.replace(plan, side_by_side=True), {"noise": 0.01}, bad),
        "unavailable": (plan, {"at": [{"op": "load", "id": B.id, "do": "error", "kind": "unavailable"}]}, {}),
    }


@pytest.mark.parametrize("case", _cases())
def test_going_on_gives_what_no_break_gives(case):
    """Cut after every event; and 30 times at random moments again and again, until it is whole."""
    plan, script, bad = _cases()[case]
    whole = Bench(plan, script, bad=bad)
    expected = result(whole.run())
    assert result(Measurements(plan, whole.events)) == expected
    again = Bench(plan, script, whole.events, bad)
    again.run()
    assert again.turns == [] and again.asked == []  # nothing is measured twice
    for cut in range(len(whole.events) + 1):
        assert result(Bench(plan, script, whole.events[:cut], bad).run()) == expected, f"cut after {cut} events"
    for seed in range(30):
        draw, events, finished = random.Random(seed), [], False
        while not finished:
            bench = Bench(plan, script, events, bad, kill_after=len(events) + draw.randrange(3, 12))
            try:
                measurements = bench.run()
                finished = True
            except Stopped:
                pass
            events = bench.events
        assert result(measurements) == expected, f"seed {seed}"


def test_a_doubled_plan_goes_on_with_the_undecided_alone():
    slots = (Slot(A), Slot(A, "base"), Slot(B), Slot(B, "base"))
    plan = Plan(slots, launches=3, rounds=1)
    bench = Bench(plan)
    bench.run()
    doubled = plan.doubled([B.id])
    assert [slot.name for slot in doubled.slots] == [B.id, f"{B.id}@base"]
    assert (doubled.launches, doubled.rounds) == (6, 1)
    bench.turns.clear()
    measurements = bench.run(doubled, first=3)
    names = [B.id, f"{B.id}@base"]
    assert bench.turns == [
        (launch, name) for launch in (3, 4, 5) for name in (names if launch % 2 == 0 else names[::-1])
    ]
    assert sorted(measurements.by_name[B.id].launches) == [0, 1, 2, 3, 4, 5]
    assert sorted(measurements.by_name[A.id].launches) == [0, 1, 2]
    assert result(Measurements(plan, bench.events)) == result(measurements)


@pytest.mark.parametrize(
    "change",
    [
        {"slot": "another"},
        {"slot": None},
        {"launch": -1},
        {"launch": 4},  # twice the launches, when undecided, and no more
        {"launch": "0"},
        {"launch": 1},  # which was not loaded
    ],
)
def test_events_of_another_plan_are_refused(change):
    plan = Plan(THREE, launches=2, rounds=1)
    bench = Bench(plan)
    bench.run()
    events = [event for event in bench.events if event["launch"] == 0]
    with pytest.raises(ValueError, match=r"no slot of this plan|never loaded"):
        Measurements(plan, [*events, {**events[1], **change}])


def test_a_plan_agrees_with_itself_alone():
    plan = Plan(THREE, launches=2, rounds=1)
    same_name = Configuration(attention="original", steps=2, prompt="Another photo")
    others = [
        Plan(THREE[:2], 2, 1),
        Plan(THREE[::-1], 2, 1),
        Plan(THREE, 3, 1),
        Plan(THREE, 2, 2),
        Plan((*THREE[:2], Slot(C, "aa")), 2, 1),
        Plan((Slot(same_name), *THREE[1:]), 2, 1),
    ]
    assert same_name.id == A.id
    assert all(other.as_dict() != plan.as_dict() for other in others)
