"""Overhead of the harness: clock readings, and round trips to a worker.

    pytest perf/test_overhead.py

It runs only when named. A timed round contains no round trip, because workers time themselves; clock readings bracket it.
`fraction_of_a_round` in the saved run relates the median to 0.1 s, shorter than any round of the suite, and should stay
below 0.001.
"""

from __future__ import annotations

import pytest

from perf.launch.process import Interpreter, ProcessLaunch
from perf.plugin.benchmark_bridge import OVERHEAD
from perf.worker.clock import CLOCKS

SHORT_ROUND_SECONDS = 0.1
pytestmark = [pytest.mark.benchmark(group=OVERHEAD), pytest.mark.overhead]


def _add_fraction(benchmark) -> None:
    if benchmark.enabled:
        benchmark.extra_info["fraction_of_a_round"] = benchmark.stats.stats.median / SHORT_ROUND_SECONDS


@pytest.mark.parametrize("name", CLOCKS)
def test_clock(benchmark, name):
    read = CLOCKS[name]
    benchmark.pedantic(read, rounds=1000, warmup_rounds=100)
    _add_fraction(benchmark)


def test_round_trip(benchmark):
    with ProcessLaunch(Interpreter()) as worker:
        benchmark.pedantic(worker.ask, ("ping", 10.0), rounds=1000, warmup_rounds=100)
    _add_fraction(benchmark)
