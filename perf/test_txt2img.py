"""Full txt2img runs, prompt in and pixels in host memory out, and the stages by themselves.

All selected configurations are measured in turns before the first test reports: see perf.plugin.hooks.
"""

from __future__ import annotations

import pytest

from perf.configurations.configuration import Configuration
from perf.plugin.benchmark_bridge import ReplayClock

clock = ReplayClock()


@pytest.mark.benchmark(timer=clock)
def test_txt2img(measured, configuration: Configuration):
    """One round is one call of what the configuration names; loading, compiling and the warm-up round are outside."""
    workload = "" if configuration.workload == "txt2img" else f", {configuration.workload} alone"
    measured(clock, f"{configuration.model}, batch {configuration.batch}{workload}")
