"""Intervals compared with scipy and known results, and their coverage of synthetic noise."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest

pytest.importorskip("hypothesis")
from hypothesis import strategies as st

from perf.analysis.statistics import (
    Interval,
    drift,
    launch_interval,
    least_drift,
    margin,
    prediction_ratio,
    self_comparison,
    sign_interval,
    student_quantile,
    unpaired_ratio,
)

durations = st.floats(1e-3, 1e3)


def noisy(draw: random.Random, centre: float, spread: float, n: int) -> list[float]:
    return [centre * math.exp(draw.gauss(0, spread)) for _ in range(n)]


@pytest.mark.parametrize("degrees", [1, 2, 3, 5, 7, 8, 30, 101, 1000])
@pytest.mark.parametrize("probability", [0.5, 0.6, 0.9, 0.975, 0.995, 0.9999, 0.025])
def test_student_quantile_is_scipys(degrees, probability):
    expected = pytest.importorskip("scipy.stats").t.ppf(probability, degrees)
    assert student_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_student_quantile_of_the_tables():
    assert [round(student_quantile(0.975, n), 3) for n in (1, 5, 7, 20)] == [12.706, 2.571, 2.365, 2.086]


@pytest.mark.parametrize("probability, degrees", [(0.0, 5), (1.0, 5), (math.nan, 5), (0.975, 0)])
def test_student_quantile_refuses(probability, degrees):
    with pytest.raises(ValueError, match="degree"):
        student_quantile(probability, degrees)


@pytest.mark.parametrize("n", [6, 7, 8, 9, 10, 20, 35, 100, 1500])
def test_sign_interval_is_the_narrowest_with_the_confidence(n):
    binom = pytest.importorskip("scipy.stats").binom
    interval = sign_interval([float(i) for i in range(n)])
    rank = int(interval.low)
    assert interval.high == n - 1 - rank
    assert 1 - 2 * binom.cdf(rank, n, 0.5) >= 0.95 > 1 - 2 * binom.cdf(rank + 1, n, 0.5)


def test_sign_interval_of_known_ranks():
    # Ten values: the 2nd and the 9th; twenty: the 6th and the 15th.
    assert sign_interval([5, 3, 1, 2, 4, 9, 8, 7, 6, 10]) == Interval(5.5, 2, 9)
    twenty = sign_interval(range(1, 21))
    assert (twenty.low, twenty.high) == (6, 15)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_sign_interval_of_five_does_not_exist(n):
    with pytest.raises(ValueError, match="too few"):
        sign_interval([1.0] * n)


def test_prediction_interval_is_students():
    scipy_stats, np = pytest.importorskip("scipy.stats"), pytest.importorskip("numpy")
    history = noisy(random.Random(1), 24.0, 0.01, 8)
    logs = np.log(history)
    half = scipy_stats.t.ppf(0.975, 7) * logs.std(ddof=1) * np.sqrt(1 + 1 / 8)
    gap = math.log(25.0) - logs.mean()
    found = prediction_ratio(25.0, history)
    assert (found.estimate, found.low, found.high) == pytest.approx(tuple(np.exp([gap, gap - half, gap + half])))


def test_prediction_interval_includes_an_unchanged_session_in_95_percent():
    draw = random.Random(2)
    held = 0
    for _ in range(2000):
        *history, current = noisy(draw, 3.0, 0.02, 9)
        found = prediction_ratio(current, history)
        held += found.low <= 1 <= found.high
    assert 0.94 <= held / 2000 <= 0.96


def test_prediction_interval_refuses():
    with pytest.raises(ValueError, match="at least 6"):
        prediction_ratio(1.0, [1.0] * 5)
    with pytest.raises(ValueError, match="positive"):
        prediction_ratio(1.0, [1.0] * 5 + [math.nan])


def test_ratio_of_exact_series():
    interval = unpaired_ratio
    assert interval([1.1] * 10, [1.0] * 10).estimate == pytest.approx(1.1)
    assert interval([1.1] * 10, [1.0] * 10).low == pytest.approx(1.1)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_ratio_refuses(bad):
    interval = unpaired_ratio
    with pytest.raises(ValueError, match="positive and finite"):
        interval([1.0] * 5 + [bad], [1.0] * 6)
    with pytest.raises(ValueError, match="at least 6"):
        interval([1.0] * 5, [1.0] * 5)


def test_sign_interval_covers_the_median():
    """Differences of ten launches, 3 % of them disturbed."""
    draw, covered = random.Random(7), 0
    for _ in range(1000):
        values = [draw.gauss(0, 0.004) + draw.choice([-1, 1]) * 0.05 * (draw.random() < 0.03) for _ in range(10)]
        interval = sign_interval(values)
        covered += interval.low <= 0 <= interval.high
    assert covered / 1000 == pytest.approx(0.979, abs=0.016)


@pytest.mark.parametrize("n", [2, 4, 5])
def test_interval_of_few_launches_covers_the_median(n):
    draw, covered = random.Random(n), 0
    for _ in range(1000):
        interval = launch_interval(noisy(draw, 2.0, 0.05, n))
        assert interval.low <= interval.estimate <= interval.high
        covered += interval.low <= 2.0 <= interval.high
    assert covered / 1000 >= 0.93


def test_interval_of_launches_is_exact_from_six_on_and_needs_two():
    values = [1.0, 1.2, 1.1, 0.9, 1.3, 1.05]
    assert launch_interval(values) == sign_interval(values)
    with pytest.raises(ValueError, match="at least 2 launches"):
        launch_interval([1.0])
    assert launch_interval([-0.001, 0.001, 0.002]).low < 0


def test_least_drift_is_above_the_limit_for_drift_and_below_for_noise():
    draw = random.Random(11)

    def session(step: float, launches: int = 10) -> list[list[float]]:
        # wander of single launches by 2 %, and of the last third by `step`
        factors = [
            (1 + step * (launch >= launches * 2 // 3)) * math.exp(draw.gauss(0, 0.02)) for launch in range(launches)
        ]
        return [noisy(draw, factor, 0.02, 8) for factor in factors]

    noise = [least_drift(session(0.0)) for _ in range(20)]
    assert sum(low > 0.03 for low in noise) <= 1
    assert sum(least_drift(session(0.2)) > 0.03 for _ in range(20)) >= 18
    assert least_drift(session(0.2, launches=5)) is None  # too few for an interval in each third


def test_drift_is_detected_and_robust_to_one_disturbed_round():
    still = [1.0, 1.001, 0.999, 1.0] * 6
    assert drift(still) < 0.002
    assert drift([*still[:5], 2.0, *still[6:]]) < 0.002
    assert drift(still[:16] + [value * 1.04 for value in still[16:]]) == pytest.approx(0.04, abs=0.002)
    assert drift([value * 1.05 for value in still[:8]] + still[8:]) == pytest.approx(0.05, abs=0.002)
    with pytest.raises(ValueError, match="at least 6"):
        drift([1.0] * 5)


def test_margin_comes_from_the_machines_own_noise():
    assert margin() == 0.01
    assert margin([1.001, 0.998]) == 0.01
    assert margin([1.001, 0.97]) == pytest.approx(0.03)
    ratios = [1.0] * 38 + [1.05, 1.2]  # nearest rank: the 38th of 40
    assert margin(ratios) == 0.01
    assert margin([*ratios[1:], 1.05]) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="positive"):
        margin([1.0, math.nan])


def test_summary_of_self_comparisons():
    assert self_comparison([1.002, 0.99]).as_dict() == {
        "comparisons": 2,
        "p95": pytest.approx(0.01),
        "ratios": [1.002, 0.99],
    }
    with pytest.raises(ValueError, match="at least one"):
        self_comparison([])


def test_interval_without_bounds_is_null_in_json():
    assert json.loads(json.dumps(Interval.point(1.1).as_dict(), allow_nan=False)) == {
        "estimate": 1.1,
        "low": None,
        "high": None,
    }
    assert str(Interval.point(1.1)) == "1.100"
    assert str(Interval(1.1, 1.0, 1.2)) == "1.100 [1.000, 1.200]"


def test_median_of_the_unpaired_ratio():
    a, b = [1.0, 2.0, 3.0, 4.0, 5.0, 60.0, 7.0], [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert unpaired_ratio(a, b).estimate == pytest.approx(
        statistics.median(a) / math.exp((math.log(2.0) + math.log(2.5)) / 2)
    )
