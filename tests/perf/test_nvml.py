"""Opening the device through a fake NVML."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_nvml import LIBRARY_NOT_FOUND, MIG_UUID, UUID, FakeNvml, NVMLError, Steps, install_fixture  # noqa: F401

from perf.machine import nvml
from perf.machine.nvml import GpuFacts, NoTelemetry, in_initial_pid_namespace, open_device, open_visible_device
from perf.machine.telemetry import Monitor, RoundTelemetry, invalid_reason

ROOT = Path(__file__).parents[2]


def test_the_suite_without_nvml_imports_neither_torch_nor_pytest():
    machine, commands = "telemetry, nvml, facts, stack", "checks, doctor"
    code = (
        f"import sys; from perf.machine import {machine}; from perf.commands import {commands}; import perf.session.lock; "
        "print(sorted({'torch', 'pytest', 'pynvml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_missing_library_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # what an import of it then finds is ImportError
    device = open_device(None)
    assert isinstance(device, NoTelemetry) and "nvidia-ml-py cannot be imported" in device.reason


def test_without_a_driver_only_telemetry_is_missing(install):
    install(init_error=LIBRARY_NOT_FOUND)
    device = open_device(UUID)
    assert device == NoTelemetry("the NVIDIA driver does not respond (NVML Shared Library Not Found)")
    assert device.facts() == GpuFacts()
    clock = Steps()
    monitor = Monitor(device, clock=clock)
    monitor.start([1])
    round_ = monitor.stop()
    assert round_ == RoundTelemetry(seconds=1.0)
    assert invalid_reason(round_) is None


@pytest.mark.parametrize("uuid", [UUID, UUID.removeprefix("GPU-"), None])
def test_open_by_uuid_with_and_without_its_prefix_and_by_index(install, uuid):
    library = install()
    device = open_device(uuid)
    assert device.uuid() == UUID and library.users == 1
    device.close()
    device.close()
    assert library.users == 0
    assert device.uuid() is None


@pytest.mark.parametrize("uuid, index, words", [("GPU-0", 0, "GPU-0 (Not Found)"), (None, 7, "no device 7")])
def test_an_unknown_device_is_a_reason_and_nvml_is_shut_down(install, uuid, index, words):
    library = install()
    device = open_device(uuid, index)
    assert isinstance(device, NoTelemetry) and words in device.reason
    assert library.users == 0


@pytest.mark.parametrize(
    "visible, index, uuid",
    [
        (None, 0, UUID),
        ("0", 0, UUID),
        ("1,0", 1, UUID),
        (f"5, {UUID}", 1, UUID),
        (MIG_UUID, 0, MIG_UUID),
        ("", 0, None),
        ("-1", 0, None),
        ("-1,0", 1, None),
        ("0", 1, None),
    ],
)
def test_cuda_visible_devices_is_followed(install, monkeypatch, visible, index, uuid):
    install()
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    device = open_visible_device(index)
    assert isinstance(device, NoTelemetry) if uuid is None else device.uuid() == uuid


def test_names_and_numbers_are_those_of_the_library():
    """The functions that perf.machine.nvml calls exist in the library, and its constants are equal."""
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    called = set(re.findall(r"nvml(?:Device|System)[A-Z]\w+|nvmlInit|nvmlShutdown", Path(nvml.__file__).read_text()))
    later = {"nvmlDeviceGetTemperatureV"}  # than the oldest library that is allowed; there is a second name for it
    assert len(called) > 25 and [name for name in called - later if not hasattr(pynvml, name)] == []
    assert (nvml.CLOCK_SM, nvml.CLOCK_MEMORY) == (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM)
    assert nvml.TEMPERATURE_GPU == pynvml.NVML_TEMPERATURE_GPU
    assert nvml.TEMPERATURE_THRESHOLD_SLOWDOWN == pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
    for name, policy in nvml.VIOLATION_POLICIES.items():
        assert policy == getattr(pynvml, f"NVML_PERF_POLICY_{name.upper()}")
    for bit, name in nvml.CLOCKS_EVENT_REASONS.items():
        constant = f"nvmlClocksThrottleReason{name.title().replace('_', '')}"
        assert getattr(pynvml, constant, bit) == bit  # the last two are new
    assert nvml.LOST.keys() == {
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_GPU_IS_LOST,
        pynvml.NVML_ERROR_RESET_REQUIRED,
    }


def test_the_pid_namespace_is_read(monkeypatch):
    for link, initial in (("pid:[4026531836]", True), ("pid:[4026532459]", False)):
        monkeypatch.setattr("perf.machine.nvml.os.readlink", lambda path, link=link: link)
        assert in_initial_pid_namespace() is initial
