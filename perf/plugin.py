"""The pytest side of the suite: raw rounds are always saved, and machine facts that matter stand in every saved run."""

from __future__ import annotations

import platform

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Summary statistics alone cannot be compared honestly, so that a save without its rounds is never written."""
    if hasattr(config.option, "benchmark_save_data"):
        config.option.benchmark_save_data = True


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    """Add torch and the GPU; drop the momentary CPU frequency, which makes every two runs look like two machines."""
    import torch

    machine_info.get("cpu", {}).pop("hz_actual", None)
    machine_info.get("cpu", {}).pop("hz_actual_friendly", None)
    machine_info["torch"] = torch.__version__
    machine_info["cuda"] = torch.version.cuda
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info["python"] = platform.python_version()


def pytest_report_header(config):
    """One line that says what is measured on."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"perf: torch {torch.__version__} on {device}"
