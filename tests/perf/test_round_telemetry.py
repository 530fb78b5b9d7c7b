"""The summary of a round from known samples and counters, and the rules that invalidate a round."""

from __future__ import annotations

from dataclasses import replace

import pytest

from perf.machine.telemetry import Counters, RoundTelemetry, Sample, foreign_pids, invalid_reason, summarise

CLEAN = RoundTelemetry(seconds=2.0, throttle_reasons=(), foreign_pids=())


def samples(watts, period=0.02):
    return [Sample(seconds=i * period, power_watts=value) for i, value in enumerate(watts)]


def test_without_an_energy_counter_power_is_integrated():
    ramp = samples([100.0, 200.0, 300.0])
    round_ = summarise(Counters(0.0), Counters(0.05), ramp)
    assert round_.joules == pytest.approx(200.0 * 0.05) and round_.joules_source == "power_samples"
    assert round_.power_watts == pytest.approx(200.0)


def test_uneven_samples_weigh_by_time():
    uneven = [Sample(0.0, power_watts=100.0), Sample(0.9, power_watts=100.0), Sample(1.0, power_watts=300.0)]
    assert summarise(Counters(0.0), Counters(1.0), uneven).power_watts == pytest.approx(0.9 * 100 + 0.1 * 200)


@pytest.mark.parametrize("watts", [[], [400.0], [None, None, None], [None, 400.0, None]])
def test_too_few_samples_give_no_joules(watts):
    round_ = summarise(Counters(0.0), Counters(1.0), samples(watts))
    assert round_.joules is None and round_.joules_source is None and round_.power_watts is None


@pytest.mark.parametrize("begin, end", [(5000.0, 3.0), (5000.0, 5000.0), (None, 5.0), (5.0, None)])
def test_a_reset_or_constant_energy_counter_is_ignored(begin, end):
    round_ = summarise(Counters(0.0, begin), Counters(1.0, end), samples([100.0, 100.0]))
    assert (round_.joules, round_.joules_source) == (100.0, "power_samples")


def test_a_violation_counter_that_ran_backwards_is_none():
    begin, end = Counters(0.0, None, {"power": 9, "thermal": 1}), Counters(1.0, None, {"power": 3, "thermal": 4})
    assert summarise(begin, end, []).violation_nanoseconds == {"power": None, "thermal": 3}


# --- the verdict on a round


@pytest.mark.parametrize(
    "reasons, invalid",
    [
        ((), None),
        (("gpu_idle", "applications_clocks_setting", "display_clock_setting"), None),
        (("sw_power_cap", "board_limit", "reliability"), None),
        (("sw_thermal_slowdown",), "throttled: sw_thermal_slowdown"),
        (
            ("gpu_idle", "hw_slowdown", "hw_thermal_slowdown", "sw_power_cap"),
            "throttled: hw_slowdown, hw_thermal_slowdown",
        ),
        (("hw_power_brake_slowdown",), "throttled: hw_power_brake_slowdown"),
        (("sync_boost",), "throttled: sync_boost"),
        (None, None),
    ],
)
def test_which_reasons_invalidate(reasons, invalid):
    assert invalid_reason(replace(CLEAN, throttle_reasons=reasons)) == invalid


@pytest.mark.parametrize(
    "policy, milliseconds, invalid",
    [
        ("thermal", 1, None),  # of 2 s: cannot have cost more than 0.05 %
        ("thermal", 15, "throttled: thermal violation for 15 ms"),
        ("sync_boost", 15, "throttled: sync_boost violation for 15 ms"),
        ("power", 2000, None),
        ("low_utilization", 2000, None),
        ("total_app_clocks", 2000, None),
        ("thermal", None, None),
    ],
)
def test_violations_include_throttling_between_samples(policy, milliseconds, invalid):
    nanoseconds = None if milliseconds is None else milliseconds * 10**6
    assert invalid_reason(replace(CLEAN, violation_nanoseconds={policy: nanoseconds})) == invalid


def test_all_reasons_are_in_one_line():
    bad = replace(CLEAN, throttle_reasons=("hw_slowdown",), foreign_pids=(7,), error="GPU is lost")
    assert invalid_reason(bad) == "device lost: GPU is lost; throttled: hw_slowdown; shared with pid 7"


# --- foreign processes


@pytest.mark.parametrize(
    "listed, allowed, alive, same_pid_namespace, foreign",
    [
        ([10, 11], [10, 11], 2, True, set()),
        ([10, 99], [10], 1, True, {99}),
        ([99], [10], 1, True, {99}),
        ([], [10], 1, True, set()),
        ([10, 99], [10], 1, False, {99}),  # the driver translates: one of ours is listed
        ([70001], [10], 1, False, set()),  # it does not: ours, under the host's number
        ([70001, 70002], [10], 1, False, {70002}),
        ([70001, 70002], [10, 11], 1, False, {70002}),  # one of ours has ended
        ([70001], [], 0, False, {70001}),
    ],
)
def test_foreign_pids(listed, allowed, alive, same_pid_namespace, foreign):
    assert foreign_pids(listed, allowed, alive, same_pid_namespace) == foreign
