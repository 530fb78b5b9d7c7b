"""The paired estimator: coverage, false alarms and detection on simulated noise, and its small cases by hand."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from perf.analysis.paired import (
    LOOK_LEVEL,
    LOOKS,
    MOST_ROUNDS,
    ROUNDS,
    SETTLED,
    break_even,
    detectable,
    is_futile,
    is_settled,
    launch_effects,
    launches_for,
    paired_ratio,
    trimmed_error,
    trimmed_mean,
)
from perf.analysis.statistics import BreakEven
from perf.analysis.verdicts import Verdict, decide_looks


def session(
    draw: random.Random,
    launches: int,
    effect: float,
    sigma=0.03,
    launch_sigma=0.01,
    wander=0.2,
    rounds=8,
    disturbed=0.0,
):
    """Two series [launches][rounds] of seconds; wander: shared noise of each cycle, larger than what is to be found."""

    def noise() -> float:
        return draw.gauss(0, sigma) + (0.4 if disturbed and draw.random() < disturbed else 0.0)

    head, base = [], []
    for _ in range(launches):
        offset = draw.gauss(0, launch_sigma)
        shared = [draw.gauss(0, wander) for _ in range(rounds)]
        base.append([0.1 * math.exp(s + noise()) for s in shared])
        head.append([0.1 * (1 + effect) * math.exp(s + offset + noise()) for s in shared])
    return head, base


def test_trimmed_mean_ignores_disturbed_pairs():
    assert trimmed_mean([0.0, 1.0, 2.0, 900.0]) == 1.5
    assert trimmed_mean([5.0]) == 5.0 and trimmed_mean([1.0, 2.0, 3.0]) == 2.0


def test_effects_pair_rounds_of_a_cycle_and_skip_empty_launches():
    effects = launch_effects([[2.0, 4.0], [], [3.0]], [[1.0, 2.0], [1.0], [1.0, 9.0]])
    assert effects == pytest.approx([math.log(2), math.log(3)])


def test_exact_data_have_an_interval_of_no_width():
    ratio = paired_ratio([[2.0, 4.0]] * 3, [[1.0, 2.0]] * 3)
    assert (ratio.estimate, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_impossible_durations_are_rejected(bad):
    with pytest.raises(ValueError, match="positive and finite"):
        paired_ratio([[1.0], [bad]], [[1.0], [1.0]])


def test_one_launch_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 launches"):
        paired_ratio([[1.0, 2.0]], [[1.0, 2.0]])


def test_standard_error_of_a_launch_is_that_of_its_trimmed_mean():
    """Also where one round in five is disturbed."""
    draw = random.Random(4)
    launches = [[draw.gauss(0, 0.1 if draw.random() < 0.2 else 0.02) for _ in range(16)] for _ in range(3000)]
    true = statistics.pstdev(map(trimmed_mean, launches))
    found = math.sqrt(statistics.fmean(trimmed_error(launch) ** 2 for launch in launches))
    assert found == pytest.approx(true, rel=0.1)
    assert trimmed_error([9.0, 0.0, 1.0, 2.0, 4.0, 3.0, -9.0, 5.0]) == pytest.approx(math.sqrt(14 / (4 * 3)))  # by hand


def test_rounds_settle_a_launch_by_the_mean_square_of_all_its_comparisons():
    base = [1.0] * 8
    quiet = [math.exp(0.01 * sign) for sign in (1, -1) * 4]
    noisy = [math.exp(0.05 * sign) for sign in (1, -1) * 4]
    assert is_settled([(quiet, base)]) and not is_settled([(noisy, base)])
    assert is_settled([]) and not is_settled([(quiet, base), ([1.0], [1.0])])  # one round has no error
    errors = [trimmed_error([math.log(seconds) for seconds in each]) for each in (quiet, noisy)]
    assert errors[0] < SETTLED < math.hypot(*errors) / math.sqrt(2)
    assert not is_settled([(quiet, base), (noisy, base)])


@pytest.mark.parametrize("disturbed", [0.0, 0.2])
def test_interval_covers_the_true_ratio_where_noisy_launches_have_more_rounds(disturbed):
    """Launches differ in noise tenfold, and each ends when it has settled. disturbed: the share of rounds 40 % slower."""
    draw, covered, made = random.Random(2), 0, []
    for _ in range(1000):
        head, base = [], []
        for _ in range(LOOKS[0]):
            noise = draw.choice((0.01, 0.03, 0.1))
            (ours,), (theirs,) = session(draw, 1, 0.03, noise, rounds=MOST_ROUNDS, disturbed=disturbed)
            ends = range(ROUNDS, MOST_ROUNDS)
            end = next((end for end in ends if is_settled([(ours[:end], theirs[:end])])), MOST_ROUNDS)
            head.append(ours[:end])
            base.append(theirs[:end])
            made.append(end)
        ratio = paired_ratio(head, base)
        covered += ratio.low <= 1.03 <= ratio.high
    assert min(made) == ROUNDS and max(made) == MOST_ROUNDS
    assert 0.93 <= covered / 1000 <= 0.97


@pytest.mark.parametrize("launches", [4, 8, 16])
def test_interval_covers_the_true_ratio_in_95_of_100_sessions(launches):
    draw, trials, effect = random.Random(launches), 1500, 0.03
    covered = 0
    for _ in range(trials):
        ratio = paired_ratio(*session(draw, launches, effect))
        covered += ratio.low <= 1 + effect <= ratio.high
    assert 0.935 <= covered / trials <= 0.965


def test_any_look_of_a_null_session_excludes_no_change_in_at_most_6_of_100():
    draw, trials = random.Random(3), 1000
    excluded = 0
    for _ in range(trials):
        head, base = session(draw, LOOKS[-1], 0.0, rounds=4)
        ratios = [paired_ratio(head[:n], base[:n], LOOK_LEVEL) for n in LOOKS]
        excluded += any(not ratio.low <= 1 <= ratio.high for ratio in ratios)
    assert excluded / trials <= 0.065


def test_an_injected_slowdown_is_found_and_a_null_change_is_not():
    draw = random.Random(5)
    found = sum(paired_ratio(*session(draw, 8, 0.05)).low > 1.01 for _ in range(200))
    false = sum(paired_ratio(*session(draw, 8, 0.0)).low > 1.01 for _ in range(200))
    assert found >= 180 and false <= 2


def test_detectable_difference_and_the_launches_that_find_it_agree():
    effects = launch_effects(*session(random.Random(1), 8, 0.0))
    visible = detectable(effects, margin=0.01)
    assert 0.01 < visible < 0.1
    assert launches_for(effects, visible, margin=0.01) == 8
    assert launches_for(effects, (visible + 0.01) / 2, margin=0.01) > 8
    assert launches_for(effects, 0.0100001, margin=0.01) is None


def test_a_comparison_is_futile_only_where_no_look_can_decide():
    draw = random.Random(7)
    quiet = [draw.gauss(0, 0.02) for _ in range(8)]
    assert not is_futile(quiet, 0.01, LOOKS)
    hopeless = [0.5 * sign for sign in (1, -1) * 4]
    assert is_futile(hopeless, 0.01, LOOKS)
    assert not is_futile([1.0 + effect for effect in hopeless], 0.01, LOOKS)  # slower than this noise


def test_looks_end_at_the_first_verdict_and_go_on_while_undecided():
    alternating = [0.03 * sign for sign in (1, -1) * 12]
    decision, is_open = decide_looks(alternating[:8], 0.01, LOOKS)
    assert decision.code in ("straddles_margin", "interval_too_wide") and is_open and decision.launches == 8
    assert "--perf-launches" in decision.reason and "% was detectable" in decision.reason
    slower = [0.1 + 0.001 * sign for sign in (1, -1) * 4]
    decision, is_open = decide_looks([*slower, *(-1.0,) * 16], 0.01, LOOKS)  # later launches are not consulted
    assert (decision.verdict, decision.launches, is_open) == (Verdict.SLOWER, 8, False)
    decision, is_open = decide_looks(alternating[:7], 0.01, LOOKS)
    assert decision.launches == 7 and is_open
    decision, is_open = decide_looks(alternating[:4], 0.01, (4,))
    assert decision.launches == 4 and not is_open
    decision, is_open = decide_looks([0.5 * sign for sign in (1, -1) * 4], 0.01, LOOKS)
    assert decision.verdict is Verdict.INCONCLUSIVE and not is_open


def test_break_even_of_exact_series():
    def series(seconds: float) -> list[list[float]]:
        return [[seconds] * 3] * 4

    assert break_even(60.0, series(3.0), series(2.0)) == BreakEven(60, 60, 60)
    assert break_even(60.5, series(3.0), series(2.0)).estimate == 61
    assert break_even(0.0, series(3.0), series(2.0)) == BreakEven(0, 0, 0)
    assert break_even(60.0, series(2.0), series(3.0)) == BreakEven(None, None, None)
    unclear = break_even(60.0, [[2.0], [3.0]] * 3, [[2.1], [2.8]] * 3)
    assert unclear.estimate is None and unclear.high is None and unclear.low > 0
    with pytest.raises(ValueError, match="cannot take"):
        break_even(-1.0, series(3.0), series(2.0))
    with pytest.raises(ValueError, match="at least 2 launches"):
        break_even(1.0, [[3.0]], [[2.0]])


def test_exchanging_the_sides_inverts_the_interval():
    head, base = session(random.Random(2), 6, 0.03)
    there, back = paired_ratio(head, base), paired_ratio(base, head)
    assert (1 / back.estimate, 1 / back.high, 1 / back.low) == pytest.approx((there.estimate, there.low, there.high))


def test_interval_is_scipys_student_t():
    stats = pytest.importorskip("scipy.stats")
    head, base = session(random.Random(4), 8, 0.02)
    effects, ratio = launch_effects(head, base), paired_ratio(head, base)
    expected = stats.ttest_1samp(effects, 0.0).confidence_interval(0.95)
    assert (math.log(ratio.low), math.log(ratio.high)) == pytest.approx((expected.low, expected.high))
    pairs = [[math.log(a / b) for a, b in zip(ours, theirs)] for ours, theirs in zip(head, base)]
    assert effects == pytest.approx([stats.trim_mean(values, 0.25) for values in pairs])
