"""Verdict rules: injected slowdowns must be SLOWER, A/A comparisons must not."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from perf.analysis.statistics import Interval, prediction_half_width, prediction_ratio
from perf.analysis.verdicts import (
    REASONS,
    Decision,
    ExitCode,
    Verdict,
    decide_against_history,
    decide_interval,
    decide_paired,
    exit_code,
    ratio_of_sessions,
)

SLOWER, FASTER, SAME, INCONCLUSIVE, INVALID = Verdict


def interleaved(draw: random.Random, slow: float = 1.0, launches: int = 10) -> tuple[list[float], list[float]]:
    """Head and base of one session: wander that both share, and launch and round noise of their own, in seconds.

    A fraction of rounds is disturbed, upwards as in reality; `slow` is what the code of the head costs.
    """
    wander, head, base = draw.gauss(0, 0.012), [], []
    for _ in range(launches):
        wander = 0.8 * wander + draw.gauss(0, 0.003)
        for series, factor in ((head, slow), (base, 1.0)):
            disturbed = abs(draw.gauss(0, 0.05)) if draw.random() < 0.03 else 0.0
            series.append(2.0 * factor * math.exp(wander + draw.gauss(0, 0.003) + draw.gauss(0, 0.004) + disturbed))
    return head, base


def effects(head: list[float], base: list[float]) -> list[float]:
    return [math.log(ours / theirs) for ours, theirs in zip(head, base)]


def test_paired_rule_finds_five_percent_and_no_false_alarm():
    draw = random.Random(20230414)
    unchanged = [decide_paired(effects(*interleaved(draw)), 0.01).verdict for _ in range(80)]
    slowed = [decide_paired(effects(*interleaved(draw, 1.05)), 0.01).verdict for _ in range(40)]
    quicker = [decide_paired(effects(*interleaved(draw, 1 / 1.05)), 0.01).verdict for _ in range(20)]
    assert unchanged.count(SLOWER) + unchanged.count(FASTER) <= 1
    assert unchanged.count(SAME) >= 66
    assert slowed.count(SLOWER) >= 38
    assert quicker.count(FASTER) >= 19


def test_history_rule_finds_five_percent_and_few_false_alarms():
    draw = random.Random(20230415)

    def verdicts(slow: float) -> list[Verdict]:
        judged = []
        for _ in range(1000):
            *history, current = (24.0 * math.exp(draw.gauss(0, 0.005)) for _ in range(9))
            judged.append(decide_against_history(current * slow, history, margin=0.01).verdict)
        return judged

    unchanged = verdicts(1.0)
    assert unchanged.count(SLOWER) <= 20  # 2 %: the floor of 1 % takes a little off the interval's own 2.5 %
    assert unchanged.count(FASTER) <= 20
    assert verdicts(1.05).count(SLOWER) >= 980
    assert verdicts(1 / 1.05).count(FASTER) >= 980


def test_history_rule_in_a_quiet_storage():
    history = [24.0, 24.02, 23.98, 24.01, 23.99, 24.0]
    assert str(decide_against_history(24.01, history, 0.01, "0007_nightly")) == (
        "SAME +0.0 % [-0.1, 0.2] against 0007_nightly (within_margin)"
    )
    assert decide_against_history(24.0 * 1.05, history, 0.01).verdict is SLOWER
    assert decide_against_history(24.0 / 1.05, history, 0.01).verdict is FASTER
    # Beyond the prediction, and still nothing to speak of.
    small = decide_against_history(24.0 * 1.005, history, 0.01)
    assert small.ratio.low > 1 and small.verdict is SAME


def test_history_rule_in_a_storage_too_noisy_to_tell():
    history = [24.0, 26.0, 22.0, 25.0, 23.0, 24.0]
    decision = decide_against_history(24.0 * 1.05, history, 0.01)
    assert (decision.verdict, decision.code) == (INCONCLUSIVE, "interval_too_wide")
    assert decision.reason.endswith("these sessions vary too much for 2.0 %: --perf-against")
    assert decide_against_history(24.0 * 1.5, history, 0.01).verdict is SLOWER


@pytest.mark.parametrize("named, wander", [(False, 1.5), (True, 1.1)])
def test_history_rule_states_what_it_could_have_found(named, wander):
    """The detectable slowdown is on the edge of SLOWER, and the proposed number of sessions detects twice the margin."""
    history = [24.0 + wander * offset for offset in (0, 0.2, -0.2, 0.1, -0.1, 0)]
    base = 24.0 if named else None
    decision = decide_against_history(24.0 * 1.012, history, 0.01, base=base)
    found = re.fullmatch(r"\w+ ([\d.]+) % was detectable; (\d+) stored sessions detect 2.0 %", decision.reason)
    assert found, decision
    visible, needed = float(found[1]) / 100, int(found[2])
    assert decide_against_history(24.0 * (1 + visible + 0.001), history, 0.01, base=base).verdict is SLOWER
    assert decide_against_history(24.0 * (1 + visible - 0.001), history, 0.01, base=base).verdict is not SLOWER
    assert prediction_half_width(history, needed, named) <= math.log(1.02)
    assert prediction_half_width(history, needed - 1, named) > math.log(1.02)


@pytest.mark.parametrize("sessions", range(1, 6))
def test_under_six_sessions_there_is_a_ratio_to_the_newest_and_no_verdict(sessions):
    decision = decide_against_history(48.0, [30.0] * (sessions - 1) + [24.0], 0.01, "0002_a")
    assert (decision.verdict, decision.reason, decision.ratio.estimate) == (INCONCLUSIVE, "too_few_sessions", 2.0)
    assert str(decision) == "INCONCLUSIVE +100.0 % against 0002_a (too_few_sessions)"
    assert decide_against_history(48.0, [24.0] * 6, 0.01).verdict is SLOWER


def test_no_history():
    assert decide_against_history(1.0, [], 0.01) == Decision(INCONCLUSIVE, "no_baseline", margin=0.01)


@pytest.mark.parametrize(
    "low, high, verdict, reason",
    [
        (1.011, 1.5, SLOWER, "beyond_margin"),
        (1.010, 1.5, INCONCLUSIVE, "interval_too_wide"),
        (0.5, 0.989, FASTER, "beyond_margin"),
        (0.5, 0.990, INCONCLUSIVE, "interval_too_wide"),
        (0.98, 1.02, SAME, "within_margin"),
        (0.979, 1.0, INCONCLUSIVE, "straddles_margin"),
        (1.0, 1.021, INCONCLUSIVE, "straddles_margin"),
        (0.9, 1.1, INCONCLUSIVE, "interval_too_wide"),
    ],
)
def test_rule_of_one_session_at_its_edges(low, high, verdict, reason):
    decision = decide_interval(Interval((low + high) / 2, low, high), 0.01)
    assert (decision.verdict, decision.reason) == (verdict, reason)


def test_margin_decides():
    slower = [math.log(1.05)] * 10
    assert decide_paired(slower, 0.01).verdict is SLOWER
    assert decide_paired(slower, 0.04).verdict is SLOWER
    assert decide_paired(slower, 0.05).verdict is SAME  # inside twice the margin
    assert decide_paired([0.0] * 10, 0.01).verdict is SAME


@pytest.mark.parametrize("margin", [0.0, -0.01, math.nan, math.inf])
def test_impossible_margin(margin):
    with pytest.raises(ValueError, match="positive fraction"):
        decide_paired([0.0] * 6, margin)
    with pytest.raises(ValueError, match="positive fraction"):
        decide_against_history(1.0, [1.0] * 6, margin)


def test_too_few_launches_are_no_error():
    for few in ([], [0.7]):
        decision = decide_paired(few, 0.01)
        assert (decision.verdict, decision.code, decision.launches) == (INCONCLUSIVE, "too_few_rounds", len(few))
        assert "no difference was detectable; --perf-launches 8" in decision.reason


def test_an_inconclusive_pair_states_what_was_detectable_and_the_launches_that_are_needed():
    decision = decide_paired([0.03, -0.03] * 4, 0.01, launch_seconds=30.0)
    assert decision.verdict is INCONCLUSIVE
    match = re.fullmatch(
        r"interval_too_wide ([\d.]+) % was detectable; --perf-launches (\d+) detects 2.0 % in about (\d+) min",
        decision.reason,
    )
    assert match, decision.reason
    visible, launches = float(match[1]) / 100, int(match[2])
    assert visible > 0.02 and launches > 8 and int(match[3]) == round(launches / 2)
    noise = [0.03, -0.03] * (launches // 2)
    assert decide_paired([math.log(1.0205) + each for each in noise], 0.01).verdict is SLOWER
    hopeless = decide_paired([1.0, -1.0] * 4, 0.01)
    assert "2.0 % needs more than 1000 launches" in hopeless.reason


def test_impossible_durations_of_the_history():
    with pytest.raises(ValueError, match="positive"):
        decide_against_history(1.0, [1.0, math.nan], 0.01)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-0.2, 0.2), min_size=6, max_size=9), st.floats(-0.2, 0.2))
def test_exchanging_head_and_base_inverts_the_verdict(values, shift):
    there = decide_paired([value + shift for value in values], 0.01)
    back = decide_paired([-value - shift for value in values], 0.01)
    if there.verdict is FASTER:  # under 1 - m there is beyond 1 + m back
        assert back.verdict is SLOWER
    if there.verdict is SLOWER and there.ratio.low > 1.0102:  # from 1 / (1 - m), a hair's breadth above 1 + m
        assert back.verdict is FASTER
    assert {there.verdict, back.verdict} != {SLOWER}
    assert {there.verdict, back.verdict} != {FASTER}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.5, 2.0), min_size=6, max_size=12), st.floats(0.1, 10))
def test_inverting_all_sessions_inverts_the_verdict(history, current):
    there = decide_against_history(current, history, 0.01).verdict
    back = decide_against_history(1 / current, [1 / value for value in history], 0.01).verdict
    if there is FASTER:
        assert back is SLOWER
    assert (there, back) not in ((SLOWER, SLOWER), (FASTER, FASTER), (SLOWER, SAME))


def test_ratio_of_two_sessions():
    assert ratio_of_sessions([3.2, 2.9, 3.0], [1.0, 2.0]) == Interval.point(2.0)
    assert ratio_of_sessions([2.2] * 6, [2.0] * 6).bounded


def test_decision_in_one_line_and_in_json():
    decision = Decision(SLOWER, "beyond_margin", Interval(1.062, 1.049, 1.077), 0.01, "0007_nightly")
    assert str(decision) == "SLOWER +6.2 % [4.9, 7.7] against 0007_nightly (beyond_margin)"
    assert json.loads(json.dumps(decision.as_dict(), allow_nan=False)) == {
        "verdict": "SLOWER",
        "reason": "beyond_margin",
        "ratio": {"estimate": 1.062, "low": 1.049, "high": 1.077},
        "margin": 0.01,
        "against": "0007_nightly",
        "raw_ratio": None,
        "launches": None,
    }
    between = dataclasses.replace(decision, raw_ratio=1.09)
    assert str(between) == (
        "SLOWER +6.2 % [4.9, 7.7] in reference workloads, raw +9.0 %, against 0007_nightly (beyond_margin)"
    )
    assert str(Decision(INVALID, "anchor_drift 4.1 %")) == "INVALID (anchor_drift 4.1 %)"
    tiny = Interval(0.9999, 0.9996, 1.0004)  # rounds to nothing, and nothing has no sign
    assert str(Decision(SAME, "within_margin", tiny)) == "SAME +0.0 % [0.0, 0.0] (within_margin)"


def test_reasons_are_the_documented_ones():
    with pytest.raises(ValueError, match="unknown reason 'slow day'"):
        Decision(SLOWER, "slow day")
    assert all(" " not in code and meaning for code, meaning in REASONS.items())


@pytest.mark.parametrize(
    "verdicts, options, expected",
    [
        ([], {}, ExitCode.OK),
        ([SAME, FASTER], {"strict": True}, ExitCode.OK),
        ([SAME, SLOWER], {}, ExitCode.SLOWER),
        ([INCONCLUSIVE, SLOWER], {"strict": True}, ExitCode.SLOWER),
        ([INCONCLUSIVE, SAME], {}, ExitCode.OK),
        ([INCONCLUSIVE, SAME], {"strict": True}, ExitCode.INCONCLUSIVE),
        ([SLOWER, INVALID], {}, ExitCode.FAILED),
        ([SLOWER], {"failed": True}, ExitCode.FAILED),
    ],
)
def test_exit_codes(verdicts, options, expected):
    assert exit_code([Decision(verdict, "within_margin") for verdict in verdicts], **options) is expected


def test_exit_codes_are_the_promised_numbers():
    assert [int(code) for code in ExitCode] == [0, 1, 4, 20, 21]


def test_against_one_named_session():
    """The ratio is to that session, and the history gives the variation: an equal run is not slower."""
    history = [24.0, 24.1, 23.9, 24.05, 23.95, 24.02, 23.98]
    assert decide_against_history(25.3, history, 0.01).verdict is SLOWER
    same = decide_against_history(25.3, history, 0.01, "0009_slow", base=25.2)
    assert (same.verdict, same.against, round(same.ratio.estimate, 4)) == (SAME, "0009_slow", round(25.3 / 25.2, 4))
    assert decide_against_history(26.6, history, 0.01, base=25.2).verdict is SLOWER
    assert decide_against_history(26.6, history[:5], 0.01, base=25.2).ratio.estimate == pytest.approx(26.6 / 25.2)


def test_interval_of_two_sessions_includes_no_change():
    """95 % of pairs of sessions that differ by their offsets only."""
    seed = random.randrange(2**32)
    print(f"random.Random({seed})")
    draw, held = random.Random(seed), 0
    for _ in range(2000):
        *history, base, current = (math.exp(draw.gauss(3, 0.01)) for _ in range(12))
        ratio = prediction_ratio(current, history, base=base)
        held += ratio.low <= 1 <= ratio.high
    assert 0.93 <= held / 2000 <= 0.97
