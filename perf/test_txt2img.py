"""Full txt2img and inpainting runs, from the prompt to pixels in host memory, single stages, and training.

All selected configurations are measured in turns before the first test reports (perf.plugin.hooks).
"""

from __future__ import annotations

import pytest

from perf.configurations.configuration import Configuration
from perf.plugin.benchmark_bridge import ReplayClock

clock = ReplayClock()


@pytest.mark.benchmark(timer=clock)
def test_txt2img(replayed, configuration: Configuration):
    """Time one call of the workload per round, without loading, compilation and the warm-up round."""
    workload = {"txt2img": "", "inpaint": ", inpainting", "train": ", training"}.get(
        configuration.workload, f", {configuration.workload} alone"
    )
    replayed(clock, f"{configuration.model}, batch {configuration.batch}{workload}")
