"""The device and software stack to be measured, read without importing torch, which takes seconds."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from importlib import metadata
from pathlib import Path

from perf.machine.facts import cpu_facts
from perf.machine.nvml import Device, NoTelemetry

PEAK_RATES = ("matmul_flops_per_second", "copy_bytes_per_second")


def stack(device: str, gpu: Device | NoTelemetry) -> dict:
    """Return `machine_info.stack` of a saved run; a session measures its peak rates (PEAK_RATES)."""
    cpu = cpu_facts()
    facts = {
        "device": device,
        "name": cpu.name,
        "processor": cpu.processor if device == "cpu" else None,
        "uuid": None,
        "driver": None,
        "torch": torch_version("__version__") or package_version("torch"),
        "cuda": torch_version("cuda"),
        "cudnn": _cudnn(),
        "triton": package_version("triton"),
        "xformers": package_version("xformers"),
        "python": platform.python_version(),
        "memory_bytes": cpu.memory_bytes,
        "power_limit_watts": None,
        "sm_clock_max_mhz": None,
        "memory_clock_max_mhz": None,
        "hosted": {"github-hosted": True, "self-hosted": False}.get(os.environ.get("RUNNER_ENVIRONMENT", "")),
        **dict.fromkeys(PEAK_RATES),
    }
    if device == "cuda":
        facts.update({name: value for name, value in vars(gpu.facts()).items() if name in facts})
    return facts


def torch_version(name: str) -> str | None:
    """Return `__version__` or `cuda` of the installed torch from its version.py; None without torch."""
    package = importlib.util.find_spec("torch")
    if package is None or not package.submodule_search_locations:
        return None
    try:
        text = (Path(package.submodule_search_locations[0]) / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def _cudnn() -> str | None:
    """The version of cuDNN's own package, which torch from a package index depends on."""
    names = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu11")
    return next(filter(None, map(package_version, names)), None)


def package_version(package: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
