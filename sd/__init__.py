"""Stable Diffusion 1.x and 2.x in plain PyTorch."""

from typing import TYPE_CHECKING

from sd.errors import BadImage, CheckpointError, ConfigError, SDError, SDWarning, Unavailable

if TYPE_CHECKING:
    from sd.optimise.optimisations import Optimisations
    from sd.pipeline import Result, StableDiffusion

__version__ = "0.1.0"  # read by pyproject.toml

__all__ = [
    "BadImage",
    "CheckpointError",
    "ConfigError",
    "Optimisations",
    "Result",
    "SDError",
    "SDWarning",
    "StableDiffusion",
    "Unavailable",
]

_MODULES = {"Optimisations": "sd.optimise.optimisations", "Result": "sd.pipeline", "StableDiffusion": "sd.pipeline"}


def __getattr__(name: str) -> object:
    """Import torch and the model at the first access, so that `python -m sd.attention` imports only its own module."""
    if name not in _MODULES:
        raise AttributeError(f"module 'sd' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
