"""A fake `pynvml` module, since NVML comes with a driver that test machines lack.

It has the function names, units, result types and errors of nvidia-ml-py, and one GPU whose state a test sets.
"""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest


class NVMLError(Exception):
    def __init__(self, value: int):
        super().__init__({3: "Not Supported", 6: "Not Found", 12: "NVML Shared Library Not Found"}.get(value, "Error"))
        self.value = value


NOT_SUPPORTED, NOT_FOUND, LIBRARY_NOT_FOUND, GPU_IS_LOST = 3, 6, 12, 15
UUID = "GPU-11111111-2222-3333-4444-555555555555"
MIG_UUID = "MIG-66666666-7777-8888-9999-000000000000"
GPU, MIG = "gpu handle", "mig handle"
# The readings that NVML supports for a MIG instance.
MIG_READS = {"Name", "UUID", "MemoryInfo", "ComputeRunningProcesses_v3", "DeviceHandleFromMigDeviceHandle"}
STATE = {
    "Name": "NVIDIA H200",
    "UUID": UUID,
    "MemoryInfo": SimpleNamespace(total=150 << 30, used=1 << 30, free=149 << 30),
    "CudaComputeCapability": (9, 0),
    "ClockInfo": {1: 1980, 2: 3201},
    "MaxClockInfo": {1: 1980, 2: 3201},
    "ApplicationsClock": {1: 1980},
    "DefaultApplicationsClock": {1: 1980},
    "PowerUsage": 650_000,  # mW
    "TotalEnergyConsumption": 5_000_000,  # mJ
    "EnforcedPowerLimit": 700_000,
    "PowerManagementDefaultLimit": 700_000,
    "TemperatureV": {0: 55},
    "TemperatureThreshold": {1: 90},
    "CurrentClocksEventReasons": 0,
    "ViolationStatus": dict.fromkeys((0, 1, 2, 3, 4, 5, 10, 11), 0),
    "ComputeRunningProcesses_v3": [],
    "PersistenceMode": 1,
    "MigMode": [0, 0],
}


class FakeNvml:
    """`state[X]` is what nvmlDeviceGetX returns: a value, a dict by the last argument, or an NVMLError to raise.

    A function missing in `state` is not supported. `reads` counts the calls by X; `on_read` is called with X.
    """

    NVMLError = NVMLError

    def __init__(self, changes: dict | None = None, init_error: int | None = None):
        self.state = copy.deepcopy({**STATE, **(changes or {})})
        self.init_error = init_error
        self.users = 0
        self.reads: dict[str, int] = {}
        self.on_read = lambda name: None

    def nvmlInit(self):
        if self.init_error:
            raise NVMLError(self.init_error)
        self.users += 1

    def nvmlShutdown(self):
        assert self.users > 0, "shut down more often than initialised"
        self.users -= 1

    def nvmlDeviceGetHandleByIndex(self, index):
        if index != 0:
            raise NVMLError(2)
        return GPU

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in (UUID, MIG_UUID):
            raise NVMLError(NOT_FOUND)
        return GPU if uuid == UUID else MIG

    def nvmlDeviceIsMigDeviceHandle(self, handle):
        return int(handle == MIG)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle):
        return GPU

    def nvmlSystemGetDriverVersion(self):
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return 13000

    def __getattr__(self, function):
        if not function.startswith("nvmlDeviceGet"):
            raise AttributeError(function)
        name = function[len("nvmlDeviceGet") :]

        def read(handle, *arguments):
            self.reads[name] = self.reads.get(name, 0) + 1
            try:
                return self._answer(name, handle, *arguments)
            finally:
                self.on_read(name)  # after the reading: changes by the test affect later ones only

        return read

    def _answer(self, name, handle, *arguments):
        value = self.state.get(name, NVMLError(NOT_SUPPORTED))
        if handle == MIG:
            if name not in MIG_READS:
                raise NVMLError(NOT_SUPPORTED)
            value = {"UUID": MIG_UUID, "Name": "NVIDIA H200 MIG 1g.18gb"}.get(name, value)
        if isinstance(value, dict):
            value = value.get(arguments[-1], NVMLError(NOT_SUPPORTED))
        if isinstance(value, NVMLError):
            raise value
        if name == "ViolationStatus":
            return SimpleNamespace(referenceTime=0, violationTime=value)
        if name.startswith("ComputeRunningProcesses"):
            return [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in value]
        return value


@pytest.fixture(name="install")
def install_fixture(monkeypatch):
    """Install a FakeNvml as `pynvml`, on a machine with the host's process ids."""
    monkeypatch.setattr("perf.machine.telemetry.in_initial_pid_namespace", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(changes: dict | None = None, init_error: int | None = None) -> FakeNvml:
        library = FakeNvml(changes, init_error)
        monkeypatch.setitem(sys.modules, "pynvml", library)
        return library

    return put


class Steps:
    """A clock that advances by a second at each reading."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now
