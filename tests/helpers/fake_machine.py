"""Facts of a machine fit to measure, and a fake torch package for the process that probes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from perf.commands.torch_probe import StackFacts
from perf.machine.facts import CpuFacts
from perf.machine.nvml import GpuFacts

GIB = 1 << 30
HELD = frozenset({"applications_clocks_setting"})
H200 = GpuFacts(
    name="NVIDIA H200",
    uuid="GPU-1",
    driver="580.65.06",
    cuda_driver=(13, 0),
    memory_bytes=141 * GIB,
    memory_used_bytes=GIB,
    power_limit_watts=700.0,
    power_limit_default_watts=700.0,
    sm_clock_mhz=345,
    sm_clock_max_mhz=1980,
    clocks_event_reasons=HELD,
    temperature_celsius=31,
    temperature_slowdown_celsius=90,
    persistence_mode=True,
    mig_mode=False,
    compute_pids=frozenset(),
)
STACK = StackFacts(
    python="3.11.7",
    torch="2.15.0+cu132",
    torch_imported=True,
    cuda="13.2",
    cudnn=92600,
    device="NVIDIA H200",
    uuid="1",
    capability=(9, 0),
    arch_list=("sm_75", "sm_90"),
    triton="3.9.0",
    xformers="0.0.35",
    xformers_requires=("torch>=2.10", "numpy"),
)
QUIET = CpuFacts(
    name="AMD EPYC",
    cores=8,
    governors=("performance",),
    load_average_1_minute=0.1,
    memory_bytes=64 * GIB,
    memory_available_bytes=60 * GIB,
    swap_used_bytes=0,
    cpu_seconds=1000,
    steal_seconds=0,
)
LATER = replace(QUIET, cpu_seconds=2000)
# A fake torch for the probing process, which then takes milliseconds and can fail.
FAKE_TORCH = """
import math, os, signal, subprocess, sys, time
from types import SimpleNamespace as Space
__version__ = "2.99.0+cu130"
version = Space(cuda="13.0", hip=None)
cuda = Space(
    is_available=lambda: True,
    device_count=lambda: 1,
    get_device_properties=lambda index: Space(name="NVIDIA H200", uuid="11111111-2222-3333-4444-555555555555", major=9, minor=0),
    get_arch_list=lambda: ["sm_80", "sm_90"],
)
backends = Space(cudnn=Space(is_available=lambda: True, version=lambda: 91000))
linspace = lambda begin, end, count, device: 0.5
sin, cos = math.sin, math.cos
allclose = lambda a, b, atol: abs(a - b) <= atol
def compile(function):
    from torch._dynamo.utils import counters
    counters["stats"]["unique_graphs"] = 1
    for cache in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.makedirs(os.environ[cache])
    return function
"""


def stand_in(monkeypatch, folder: Path, modules: list[str]) -> None:
    """Put empty modules first on the import path; the installed ones take seconds to import."""
    for module in modules:
        (folder / module).parent.mkdir(exist_ok=True)
        (folder / f"{module}.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.fixture(name="fake_torch")
def fake_torch_fixture(tmp_path, monkeypatch):
    """Write a torch that ends with these lines, first on the import path."""
    stand_in(monkeypatch, tmp_path, ["triton/__init__", "xformers/__init__", "xformers/ops"])

    def write(lines: str = "") -> None:
        (tmp_path / "torch/_dynamo").mkdir(parents=True)
        (tmp_path / "torch/__init__.py").write_text(f"{FAKE_TORCH}\n{lines}\n")
        (tmp_path / "torch/_dynamo/__init__.py").write_text("")
        (tmp_path / "torch/_dynamo/utils.py").write_text("counters = {'stats': {'unique_graphs': 0}}\n")

    return write
