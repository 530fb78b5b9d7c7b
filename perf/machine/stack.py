"""The stack that is measured - GPU or CPU, driver, torch - told without importing torch, which takes seconds."""

from __future__ import annotations

import importlib.util
import platform
import re
from importlib import metadata
from pathlib import Path

from perf.machine.facts import cpu_facts, gpu_facts
from perf.machine.nvml import Device, NoTelemetry

CEILINGS = ("matmul_flops_per_second", "copy_bytes_per_second")


def stack(device: str, gpu: Device | NoTelemetry) -> dict:
    """`machine_info.stack` of a saved run, but for the ceilings (CEILINGS), which a session measures."""
    facts = {
        "device": device,
        "name": cpu_facts().name or platform.processor() or platform.machine(),
        "uuid": None,
        "driver": None,
        "torch": torch_version("__version__") or _installed("torch"),
        "cuda": torch_version("cuda"),
        "cudnn": _cudnn(),
        "triton": _installed("triton"),
        "xformers": _installed("xformers"),
        "python": platform.python_version(),
        "memory_bytes": cpu_facts().memory_bytes,
        "power_limit_watts": None,
        "sm_clock_max_mhz": None,
        "memory_clock_max_mhz": None,
        **dict.fromkeys(CEILINGS),
    }
    if device == "cuda":
        card = gpu_facts(gpu)
        names = ("name", "uuid", "driver", "memory_bytes", "power_limit_watts", "sm_clock_max_mhz")
        facts.update({name: getattr(card, name) for name in (*names, "memory_clock_max_mhz")})
    return facts


def torch_version(name: str) -> str | None:
    """`__version__` or `cuda` of the installed torch, which it keeps in a file of its own; None without."""
    package = importlib.util.find_spec("torch")
    if package is None or not package.submodule_search_locations:
        return None
    try:
        text = (Path(package.submodule_search_locations[0]) / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def _cudnn() -> str | None:
    """The version of cuDNN's own package, of which a torch from a package index has one."""
    names = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu11")
    return next(filter(None, map(_installed, names)), None)


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
