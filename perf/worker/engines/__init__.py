"""Engines by name: our own model, and diffusers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from perf.worker.engines.interface import Engine


def open_engine(configuration: SimpleNamespace, device: str, after_step: Callable[[int, int], None] | None) -> Engine:
    """The loaded engine of a configuration (fields of perf.configurations.configuration.Configuration).

    after_step: progress callback of each sampler step, where the engine has one. Raises what loading raises.
    """
    if configuration.workload == "train":
        from perf.worker.engines.training import TrainingEngine

        return TrainingEngine(configuration, device, after_step)
    if configuration.engine == "diffusers":
        from perf.worker.engines.diffusers import DiffusersEngine

        return DiffusersEngine(configuration, device)
    from perf.worker.engines.sd import SDEngine

    return SDEngine(configuration, device, after_step)
