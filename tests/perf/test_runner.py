"""The measuring protocol: order of launches, retries, image checks and failures."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
from fake_worker import Fake
from protocol_bench import THREE, WRONG, A, Asked, B, Bench, C, result, seeds, wrong

from perf.configurations.configuration import Configuration
from perf.session.measurements import MAX_RETRIES, TRANSIENT_FAILURES, Measurements, SlotMeasurements, paired_rounds
from perf.session.plan import SEED_STRIDE, WARM_UP_ROUND, Plan, Slot
from perf.session.runner import Runner


def test_slots_that_are_loaded_one_at_a_time_take_turns_in_an_order_drawn_for_each_launch():
    plan = Plan(THREE, launches=6, rounds=2, seed=5)
    bench = Bench(plan)
    measurements = bench.run()
    names = [slot.name for slot in THREE]
    orders = [[name for launch, name in bench.turns if launch == number] for number in range(6)]
    assert all(sorted(order) == sorted(names) for order in orders) and len({tuple(order) for order in orders}) > 1
    assert [launch for launch, _ in bench.turns] == sorted(list(range(6)) * 3)
    assert [len(measurements.by_name[name].rounds()) for name in names] == [12] * 3
    again = Bench(plan)
    again.run()
    assert again.turns == bench.turns and again.asked == bench.asked
    other = Bench(replace(plan, seed=6))
    other.run()
    assert other.turns != bench.turns


@pytest.mark.parametrize("loading", ["all", "variants"])
def test_slots_that_are_loaded_together_alternate_rounds(loading):
    slots = (Slot(A), Slot(A, "aa"), Slot(B), Slot(B, "aa"))
    bench = Bench(Plan(slots, launches=2, rounds=6, loading=loading))
    alive, opened, together = [], bench.open, set()

    @contextlib.contextmanager
    def counting(slot):
        alive.append(slot.name)
        with opened(slot) as worker:
            yield worker
        alive.remove(slot.name)

    write = bench.write
    bench.open = counting
    bench.write = lambda event, content: (together.add(tuple(sorted(alive))), write(event, content))
    measurements = bench.run()
    names = [slot.name for slot in slots]
    groups = [names] if loading == "all" else [names[:2], names[2:]]
    assert alive == [] and {tuple(sorted(group)) for group in groups} <= together
    assert all(any(set(running) <= set(group) for group in groups) for running in together)
    assert [len(measurements.by_name[name].rounds()) for name in names] == [12] * 4
    for group in groups:
        timed = [name for name, launch, seed in bench.asked if launch == 0 and name in group and seed in seeds(6)]
        cycles = [timed[start : start + len(group)] for start in range(0, len(timed), len(group))]
        assert len(cycles) == 6 and all(sorted(cycle) == sorted(group) for cycle in cycles)
        assert len({tuple(cycle) for cycle in cycles}) > 1  # the order is drawn anew
    seeds_of_a = [seed for name, launch, seed in bench.asked if (name, launch) == (A.id, 0)]
    assert seeds_of_a[1:] == seeds(6)


def test_a_launch_that_is_not_settled_has_further_cycles_of_all_slots():
    """The second launch settles after 4 rounds, the third never."""

    def settled(measurements: Measurements, launch: int, slots: Sequence[Slot]) -> bool:
        (rounds,) = {len(measurements.by_name[slot.name].launches[launch].rounds) for slot in slots}  # whole cycles
        return rounds >= (2, 4, 100)[launch]

    bench = Bench(Plan(THREE, launches=3, rounds=2, loading="all", most_rounds=5), settled=settled)
    measurements = bench.run()
    for slot in THREE:
        launches = measurements.by_name[slot.name].ordered_launches()
        assert [len(launch.rounds) for launch in launches] == [2, 4, 5]
        assert [round_["seed"] for round_ in launches[2].rounds] == seeds(5)


def test_a_resumed_launch_catches_up_before_rounds_alternate_again():
    plan = Plan((Slot(A), Slot(B)), launches=1, rounds=4, loading="all", seed=3)
    whole = Bench(plan)
    whole.run()
    rounds = [i for i, event in enumerate(whole.events) if event["event"] == "round" and event["round"] is not None]
    cut = rounds[2] + 1  # in the middle of the second cycle
    resumed = Bench(plan, events=whole.events[:cut])
    resumed.run()
    number = {seed: i for i, seed in enumerate(seeds(4))}
    cycles = [number[seed] for _, _, seed in resumed.asked if seed in number]
    assert cycles == sorted(cycles) and len(cycles) == 5


def test_models_are_loaded_at_the_same_time_except_in_the_first_launch():
    """Whose seconds of loading are reported. Nothing loads during a warm-up or a timed round."""
    events = []

    class Recording(Asked):
        def send(self, operation, **arguments):
            events.append((self.launch, "send"))
            super().send(operation, **arguments)

        def ask(self, operation, timeout_seconds, **arguments):
            events.append((self.launch, operation))
            return super().ask(operation, timeout_seconds, **arguments)

    bench = Bench(Plan(THREE, launches=2, rounds=1, loading="all"))
    bench.loads_at_once = 2
    bench.open = lambda slot: contextlib.nullcontext(Recording(bench, slot, bench.turns[-1][0], Fake(bench.script)))
    bench.run()
    rounds = ["prepare", "round", "examine"] * 6  # three warm-ups, three timed
    assert [operation for launch, operation in events if launch == 0] == ["send", "load"] * 3 + rounds
    both = ["send", "send", "load", "load"]
    assert [operation for launch, operation in events if launch == 1] == [*both, "send", "load", *rounds]


def test_what_chooses_its_precision_by_a_probe_loads_alone():
    """The load of the others would disturb the probe."""
    fast = Slot(Configuration(optimise="fast"))
    runner = Bench(Plan((*THREE, fast), launches=2, rounds=1, loading="all")).runner()
    runner = replace(runner, loads_at_once=3)
    pairs = [(SlotMeasurements(slot), iter(())) for slot in (THREE[0], fast, *THREE[1:])]
    for launch, sizes in ((0, [1, 1, 1, 1]), (1, [1, 1, 2])):
        groups = list(runner._loading_groups(launch, pairs))
        assert [len(group) for group in groups] == sizes
        assert [pair for group in groups for pair in group] == pairs


def test_every_process_is_known_before_a_round_is_watched():
    """Otherwise the telemetry of a GPU would take the waiting workers for foreign processes."""
    order = []
    bench = Bench(Plan(THREE, launches=1, rounds=1, loading="all"))
    runner = Runner(
        bench.plan,
        bench.open,
        lambda slot: {"configuration": slot.configuration.as_dict(), "device": "cpu", "slowdown": 0.0, "threads": 1},
        lambda slot, seed: [],
        watch=lambda pid: (
            order.append("round") or contextlib.nullcontext(SimpleNamespace(telemetry=None, invalid=None))
        ),
        write=bench.write,
        progress=bench.progress,
        loaded=lambda pid: order.append("loaded"),
    )
    runner.run(Measurements(bench.plan))
    assert order == ["loaded"] * 3 + ["round"] * 3  # the warm-ups are not watched


@pytest.mark.parametrize("operation", ["load", "round"])
def test_side_by_side_failure_does_not_affect_the_other_variant(operation):
    slots = (Slot(A), Slot(A, "base"))
    bench = Bench(Plan(slots, launches=2, rounds=3, loading="all"), errors={(f"{A.id}@base", 0): (operation, "died")})
    measurements = bench.run()
    assert measurements.by_name[f"{A.id}@base"].failure == ("died", "so the test says")
    assert len(measurements.by_name[A.id].rounds()) == 6
    again = Bench(bench.plan, events=bench.events)  # alone its rounds would be no neighbours of those
    assert again.run().by_name[f"{A.id}@base"].failure == ("died", "so the test says") and again.turns == []


def test_a_launch_loads_warms_up_and_runs_rounds_with_different_seeds():
    bench = Bench(Plan(THREE[:1], launches=2, rounds=3))
    measured = bench.run().by_name[A.id]
    warm_up = 1 + SEED_STRIDE * WARM_UP_ROUND
    assert [seed for _, launch, seed in bench.asked if launch == 1] == [warm_up, *seeds(3)]
    assert [event["event"] for event in bench.events] == 2 * ["load", "round", "round", "round", "round"]
    assert [event["round"] for event in bench.events[1:5]] == [None, 0, 1, 2]
    first = bench.events[1]["answer"]["wall_seconds"]
    assert measured.launches[0].first_call_seconds == first
    assert first not in [one["seconds"] for one in measured.launches[0].rounds]


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"precision": "bf16"}, "precision bf16, an earlier one full"),
        ({"layers": "packed"}, "layers packed, an earlier one plain"),
        ({"layers": None}, None),
    ],
)
def test_launches_with_different_choices_are_a_failure(choice, message):
    """`fast` on a CPU chooses precision and kernels in each process, by short probes."""
    bench = Bench(Plan(THREE[:1], launches=3, rounds=2))
    opened = bench.open

    @contextlib.contextmanager
    def another_choice_in_the_second(slot):
        with opened(slot) as worker:
            ask, changed = worker.ask, choice if worker.launch == 1 else {}
            worker.ask = lambda operation, *args, **more: {**ask(operation, *args, **more), **changed}
            yield worker

    bench.open = another_choice_in_the_second
    measured = bench.run().by_name[A.id]
    if message is None:
        assert measured.failure is None and len(measured.rounds()) == 6
        return
    assert measured.failure.kind == "failed" and message in measured.failure.message
    assert len(measured.rounds()) == 2


@pytest.mark.parametrize("times", range(MAX_RETRIES + 2))
def test_an_invalid_round_is_retried_and_then_stored_as_invalid(times):
    plan = Plan(THREE[:1], launches=1, rounds=3)
    bench = Bench(plan, bad={(A.id, 0, seeds(3)[1]): times})
    measurements = bench.run()
    launch = measurements.by_name[A.id].launches[0]
    stayed = times > MAX_RETRIES
    assert [seed for _, _, seed in bench.asked].count(seeds(3)[1]) == min(times, MAX_RETRIES) + 1
    assert [one["round"] for one in launch.rounds] == [0, 1, 2]
    assert [one["invalid"] for one in launch.rounds] == [None, "throttled" if stayed else None, None]
    assert len(launch.valid()) == 3 - stayed
    assert measurements.counts() == (min(times, MAX_RETRIES + 1), min(times, MAX_RETRIES + 1) + 3 - stayed)


def test_more_than_a_fifth_of_invalid_rounds_invalidates_the_session():
    plan = Plan(THREE[:1], launches=1, rounds=8)
    of_ten = Bench(plan, bad=dict.fromkeys([(A.id, 0, seed) for seed in seeds(2)], 1)).run()
    assert (of_ten.counts(), of_ten.invalid()) == ((2, 10), None)
    of_eleven = Bench(plan, bad=dict.fromkeys([(A.id, 0, seed) for seed in seeds(3)], 1)).run()
    assert of_eleven.counts() == (3, 11)
    assert of_eleven.invalid() == "invalid_rounds 27 %, 20 % allowed"
    nothing = Bench(Plan(THREE[:1], launches=1, rounds=1), bad={(A.id, 0, 1): 99}).run()
    assert nothing.by_name[A.id].median(0) is None
    assert nothing.invalid() == "invalid_rounds 100 %, 20 % allowed"


def drifting(factors, rounds: int = 1, slots=THREE, reference_seconds=None) -> Measurements:
    """A session in which the reference workload of launch n takes factors[n] times as long."""
    plan = Plan(slots, launches=len(factors), rounds=rounds)
    bench = Bench(plan)
    bench.run()
    for event in bench.events:
        if event["event"] == "round":
            own = (reference_seconds or {}).get(event["slot"], 0.001)
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
def test_drift_of_the_reference_workload(factors, drift):
    measurements = drifting(factors)
    assert measurements.drift() == pytest.approx(drift, abs=1e-9)
    assert measurements.invalid() is None  # whatever the drift
    assert drifting([1, 2], slots=THREE[:1]).drift() is None  # too few rounds


def test_certain_drift_bars_the_session_from_being_a_baseline():
    steps = [1, 1.002, 1, 0.998, 1, 1.001, 1.05, 1.052, 1.051]
    drifted = drifting(steps)
    assert drifted.least_drift() > 0.03 and drifted.invalid() is None
    assert drifted.drifted().startswith("anchor_drift 5.")
    assert drifting([1, 1.002, 1] * 3).drifted() is None
    uncertain = drifting([1, 1.2, 0.9, 1, 1.3, 0.8, 1.06, 1.3, 0.9])
    assert uncertain.drift() > 0.03 and uncertain.drifted() is None
    few = drifting([1, 1, 1.5, 1.5, 1.5])  # launches, which have no lower bound
    assert few.least_drift() is None and few.drifted() == "anchor_drift 33.3 %, without a bound; 10 % allowed"
    assert drifting([1, 1, 1.09, 1.09, 1.09]).drifted() is None


def test_a_different_speed_of_another_interpreter_is_no_drift():
    """Interpreters may be unevenly distributed over the session, as in the further launches of undecided pairs."""
    old = Configuration(attention="original", steps=2, interpreter="torch112")
    for slots in ((A, old), (A, B, old), (old, A, B)):
        for rounds in (1, 2, 3, 5):
            measured = drifting([1] * 6, rounds, tuple(map(Slot, slots)), {old.id: 0.0015})
            assert measured.drift() == pytest.approx(0, abs=1e-12), (slots, rounds)
    moved = drifting([1, 1, 1.05], 3, (Slot(A), Slot(old)), {old.id: 0.0015})
    assert moved.drift() == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize(
    "kind", ["died", "hung", "invalid_response", "failed", "out_of_memory", "unavailable", "usage", "bad_image"]
)
@pytest.mark.parametrize("operation", ["load", "round"])
def test_a_failure_stops_its_slot_only(kind, operation):
    plan = Plan(THREE, launches=3, rounds=2)
    bench = Bench(plan, errors={(B.id, 1): (operation, kind)})
    measurements = bench.run()
    assert measurements.by_name[B.id].failure == (kind, "so the test says")
    assert [len(measurements.by_name[one.id].rounds()) for one in (A, B, C)] == [6, 2, 6]
    assert (2, B.id) not in bench.turns
    again = Bench(plan, events=bench.events)
    resumed = again.run()
    if kind in TRANSIENT_FAILURES:  # may not happen again
        assert resumed.by_name[B.id].failure is None
        assert len(resumed.by_name[B.id].rounds()) == 6
        assert again.turns == [(1, B.id), (2, B.id)]
    else:
        assert resumed.by_name[B.id].failure == (kind, "so the test says")
        assert again.turns == []


@pytest.mark.parametrize("code", WRONG)
def test_a_wrong_image_stops_its_slot_permanently(code):
    plan = Plan(THREE, launches=2, rounds=2)
    bench = Bench(plan, wrong(WRONG[code]))
    measurements = bench.run()
    kind, message = measurements.by_name[B.id].failure
    assert kind == "wrong_image" and message.startswith(f"{code}: ")
    assert [len(measurements.by_name[one.id].rounds()) for one in (A, C)] == [4, 4]
    assert bench.turns.count((1, B.id)) == 0
    resumed = Bench(plan, events=bench.events).run()  # even by a worker that would be right now
    assert resumed.by_name[B.id].failure == (kind, message)


def test_approximate_configurations_have_wider_bounds():
    one = Configuration(optimise="token_merging")
    changed = {"latent_relative_error": 0.5, "psnr_db": 10.0}
    plan = Plan((Slot(one),), launches=1, rounds=2)
    assert Bench(plan, wrong(changed, one.id)).run().by_name[one.id].failure is None
    equal = Bench(plan, wrong({"latent_relative_error": 0.0}, one.id)).run()
    assert equal.by_name[one.id].failure[1].startswith("suspiciously_equal: ")


def test_rounds_are_paired_by_launch_and_cycle():
    """If each side lacks a different round, the remaining pairs still ran at the same time."""
    plan = Plan((Slot(A), Slot(B)), launches=3, rounds=2)
    measurements = Bench(plan).run()
    one, other = (measurements.by_name[name] for name in (A.id, B.id))
    ours, theirs = paired_rounds(one, other)
    assert [len(launch) for launch in ours] == [len(launch) for launch in theirs] == [2, 2, 2]
    one.launches[0].rounds[0]["invalid"] = "shared"
    del other.launches[2]
    ours, theirs = paired_rounds(one, other)
    assert ours == [[one.launches[0].rounds[1]["seconds"]], [each["seconds"] for each in one.launches[1].rounds], []]
    assert theirs[0] == [other.launches[0].rounds[1]["seconds"]] and theirs[2] == []


def test_a_wrong_image_survives_a_kill_after_its_event():
    plan = Plan(THREE[1:2], launches=1, rounds=2)
    whole = Bench(plan, wrong(WRONG["constant"], seed=1))
    expected = result(whole.run())
    assert expected["slots"][B.id]["failure"][0] == "wrong_image"
    assert [event["event"] for event in whole.events] == ["load", "round", "round"]  # nothing comes after the picture
    for cut in range(len(whole.events) + 1):
        assert result(Bench(plan, whole.script, whole.events[:cut]).run()) == expected, cut


def test_repeated_output_is_detected_except_in_retries():
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


def test_only_the_first_round_is_compared_and_every_request_has_its_limit():
    asked = []

    class Recording(Asked):
        def ask(self, operation, timeout_seconds, **arguments):
            asked.append((operation, timeout_seconds, "check" in arguments and arguments["check"] is not None))
            return super().ask(operation, timeout_seconds, **arguments)

    bench = Bench(Plan(THREE[:1], launches=1, rounds=2))
    bench.open = lambda slot: contextlib.nullcontext(Recording(bench, slot, 0, Fake({})))
    bench.run()
    requests = [("load", 1, False)]
    for limit, compared in ((2, False), (3, True), (3, False)):
        requests += [("prepare", limit, False), ("round", limit, False), ("examine", limit, compared)]
    assert asked == requests
