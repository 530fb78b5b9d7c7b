"""What the harness itself costs: reading its clocks, and a question to a worker and back.

    pytest perf/test_overhead.py

Neither is inside a timed round - a worker times itself - but the first brackets it. `fraction_of_a_round` in the saved run
states the median against a tenth of a second, shorter than any round of the suite; it should stay under 0.001.
"""

from __future__ import annotations

import pytest

from perf.launch.process import Interpreter, ProcessLaunch
from perf.plugin.benchmark_bridge import OVERHEAD
from perf.worker.clock import CLOCKS

SHORT_ROUND_SECONDS = 0.1
pytestmark = pytest.mark.benchmark(group=OVERHEAD)


def _state(benchmark) -> None:
    if benchmark.enabled:
        benchmark.extra_info["fraction_of_a_round"] = benchmark.stats.stats.median / SHORT_ROUND_SECONDS


@pytest.mark.parametrize("name", CLOCKS)
def test_clock(benchmark, name):
    read = CLOCKS[name]
    benchmark.pedantic(read, rounds=1000, warmup_rounds=100)
    _state(benchmark)


def test_round_trip(benchmark):
    with ProcessLaunch(Interpreter()) as worker:
        benchmark.pedantic(worker.ask, ("ping", 10.0), rounds=1000, warmup_rounds=100)
    _state(benchmark)
