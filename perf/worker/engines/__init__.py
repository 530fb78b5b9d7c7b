"""Engines: one configuration as a loaded model whose `round` makes one round's output.

An engine has `round(seed) -> Output`, `precision`, `compiles` and `kernels()`; `open_engine` chooses it by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from perf.configurations.configuration import Configuration

if TYPE_CHECKING:
    from perf.worker.engines.sd import BusyLoop


def open_engine(configuration: Configuration, device: str, busy_loop: BusyLoop | None = None):
    """The loaded engine of a configuration. Raises what loading raises."""
    if configuration.engine == "diffusers":
        from perf.worker.engines.diffusers import DiffusersEngine

        return DiffusersEngine(configuration, device)
    from perf.worker.engines.sd import SDEngine

    return SDEngine(configuration, device, busy_loop)
