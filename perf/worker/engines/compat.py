"""Symbols of `sd` beyond its public API, under the module paths of this and of older commits.

`--perf-against` runs this worker on the `sd` of another commit. This file alone knows where older commits keep a symbol.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sd.errors import Unavailable

# symbol -> modules that have it, newest first
MODULES = {
    "parse": ("sd.optimise.presets", "sd.techniques"),
    "PerImageNoise": ("sd.sampling.noise", "sd.noise"),
    "layouts": ("sd.checkpoint.layouts", "sd.layouts"),
    "training": ("sd.training",),
    "StageClock": ("sd.stage_clock",),
    "Attention": ("sd.attention.functions", "sd.attention"),
    "diffusers_folder": ("sd.checkpoint.diffusers_folder", "sd.diffusers_folder"),
}
OPTIMISE_PRESETS = ("none", "original", "fast")  # of --optimise; sd.choices, which older commits lack, has the same


def model_context(model: Any) -> Any:
    """The context for direct calls of a model's networks; older commits set TF32 for the process and have only autocast."""
    if hasattr(model, "context"):
        return model.context()
    return model.optimisations.autocast(model.device)


def load(symbol: str) -> Any:
    """The symbol or module of that name in MODULES. Raises Unavailable where this `sd` is older than it."""
    for path in MODULES[symbol]:
        try:
            module = import_module(path)
        except ModuleNotFoundError as error:
            if error.name is None or not path.startswith(error.name):  # a package that the module itself needs
                raise
            continue
        return getattr(module, symbol, module)
    raise Unavailable(f"this version of sd has no {symbol}: it is older than that feature")
