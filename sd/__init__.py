"""Stable Diffusion 1.x and 2.x in plain PyTorch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sd.optimise.optimisations import Optimisations
    from sd.pipeline import Result, StableDiffusion

__version__ = "0.1.0"  # the one place: pyproject.toml reads it from here

__all__ = ["Optimisations", "Result", "StableDiffusion"]

_HOMES = {"Optimisations": "sd.optimise.optimisations", "Result": "sd.pipeline", "StableDiffusion": "sd.pipeline"}


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for: `python -m sd.attention` and its sisters run one module each."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sd' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
