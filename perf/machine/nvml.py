"""Readings of one GPU through NVML (`pynvml` of the package nvidia-ml-py). Imports neither torch nor pytest.

A reading that the card, driver, MIG mode or container does not support is None, never 0.
Source: NVIDIA, NVML API Reference Guide.
"""

from __future__ import annotations

import importlib
import itertools
import os
from dataclasses import dataclass

# Bits of nvmlDeviceGetCurrentClocksEventReasons, by the names of `nvidia-smi --query-gpu=clocks_event_reasons.*`.
# Numbers, because the library renamed its constants (ThrottleReason became EventReason).
CLOCKS_EVENT_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}
VIOLATION_POLICIES = {  # nvmlPerfPolicyType_t
    "power": 0,
    "thermal": 1,
    "sync_boost": 2,
    "board_limit": 3,
    "low_utilization": 4,
    "reliability": 5,
    "total_app_clocks": 10,
    "total_base_clocks": 11,
}
CLOCK_SM, CLOCK_MEMORY = 1, 2  # nvmlClockType_t
TEMPERATURE_GPU = 0  # nvmlTemperatureSensors_t
TEMPERATURE_THRESHOLD_SLOWDOWN = 1  # nvmlTemperatureThresholds_t
LOST = {
    9: "driver not loaded",
    15: "GPU is lost",
    16: "GPU requires restart",
}  # nvmlReturn_t: every later read fails too
NOT_AVAILABLE = 1 << 63  # NVML_VALUE_NOT_AVAILABLE has all bits set; no counter gets half as far
INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO of the Linux kernel, outside containers


@dataclass(frozen=True)
class GpuFacts:
    """The facts of a GPU or MIG instance, None for unsupported readings.

    cuda_driver: the newest CUDA version that the driver supports. application_sm_clock_mhz: set by `nvidia-smi -ac`.
    power_limit_watts: the enforced limit. mig_mode: whether the GPU is partitioned, None for models without MIG.
    """

    name: str | None = None
    uuid: str | None = None
    driver: str | None = None
    cuda_driver: tuple[int, int] | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None
    power_limit_watts: float | None = None
    power_limit_default_watts: float | None = None
    sm_clock_mhz: int | None = None
    sm_clock_max_mhz: int | None = None
    memory_clock_max_mhz: int | None = None
    application_sm_clock_mhz: int | None = None
    application_sm_clock_default_mhz: int | None = None
    clocks_event_reasons: frozenset[str] | None = None
    temperature_celsius: int | None = None
    temperature_slowdown_celsius: int | None = None
    persistence_mode: bool | None = None
    mig_mode: bool | None = None
    is_mig_instance: bool = False
    compute_pids: frozenset[int] | None = None


@dataclass(frozen=True)
class NoTelemetry:
    """The absence of NVML readings. reason: one line."""

    reason: str

    def facts(self) -> GpuFacts:
        """No facts."""
        return GpuFacts()


class Device:
    """A GPU or MIG instance. Unsupported readings are None. lost: why the GPU stopped responding, or None.

    Clocks, temperature and limits of a MIG instance are those of its GPU. Power and energy are read from the instance
    itself, where they are mostly unsupported, since the GPU's would include other instances.
    """

    def __init__(self, library, handle):
        self.lost: str | None = None
        self._library = library
        self._handle = handle
        self._gpu = handle
        self.is_mig_instance = bool(self._read("nvmlDeviceIsMigDeviceHandle", handle))
        if self.is_mig_instance:
            self._gpu = self._read("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle) or handle

    def close(self) -> None:
        """Shut NVML down. Later readings are None."""
        self._read("nvmlShutdown")
        self.lost = self.lost or "closed"  # NVML counts its users: a second shutdown would affect another user

    def facts(self) -> GpuFacts:
        """Read all facts."""
        memory = self._read("nvmlDeviceGetMemoryInfo", self._handle)
        cuda = self._read("nvmlSystemGetCudaDriverVersion_v2")
        default_limit = self._read("nvmlDeviceGetPowerManagementDefaultLimit", self._gpu)
        persistence = self._read("nvmlDeviceGetPersistenceMode", self._gpu)
        mig_modes = self._read("nvmlDeviceGetMigMode", self._gpu)
        return GpuFacts(
            name=_text(self._read("nvmlDeviceGetName", self._handle)),
            uuid=self.uuid(),
            driver=_text(self._read("nvmlSystemGetDriverVersion")),
            cuda_driver=None if cuda is None else (cuda // 1000, cuda % 1000 // 10),
            memory_bytes=None if memory is None else memory.total,
            memory_used_bytes=None if memory is None else memory.used,
            power_limit_watts=self.power_limit_watts(),
            power_limit_default_watts=_thousandth(default_limit),
            sm_clock_mhz=self.sm_clock_mhz(),
            sm_clock_max_mhz=self._read("nvmlDeviceGetMaxClockInfo", self._gpu, CLOCK_SM),
            memory_clock_max_mhz=self._read("nvmlDeviceGetMaxClockInfo", self._gpu, CLOCK_MEMORY),
            application_sm_clock_mhz=self._read("nvmlDeviceGetApplicationsClock", self._gpu, CLOCK_SM),
            application_sm_clock_default_mhz=self._read("nvmlDeviceGetDefaultApplicationsClock", self._gpu, CLOCK_SM),
            clocks_event_reasons=self.clocks_event_reasons(),
            temperature_celsius=self.temperature_celsius(),
            temperature_slowdown_celsius=self._read(
                "nvmlDeviceGetTemperatureThreshold", self._gpu, TEMPERATURE_THRESHOLD_SLOWDOWN
            ),
            persistence_mode=None if persistence is None else bool(persistence),
            mig_mode=None if mig_modes is None else bool(mig_modes[0]),
            is_mig_instance=self.is_mig_instance,
            compute_pids=self.compute_pids(),
        )

    def uuid(self) -> str | None:
        """`GPU-...` or `MIG-...`."""
        return _text(self._read("nvmlDeviceGetUUID", self._handle))

    def sm_clock_mhz(self) -> int | None:
        """The current SM clock."""
        return self._read("nvmlDeviceGetClockInfo", self._gpu, CLOCK_SM)

    def memory_clock_mhz(self) -> int | None:
        """The current memory clock."""
        return self._read("nvmlDeviceGetClockInfo", self._gpu, CLOCK_MEMORY)

    def power_watts(self) -> float | None:
        """Power drawn: momentary up to GA100, averaged over a second on newer cards (NVML reference)."""
        return _thousandth(self._read("nvmlDeviceGetPowerUsage", self._handle))

    def energy_joules(self) -> float | None:
        """Energy since the driver was loaded; Volta and newer."""
        return _thousandth(_counter(self._read("nvmlDeviceGetTotalEnergyConsumption", self._handle)))

    def power_limit_watts(self) -> float | None:
        """The enforced power limit, the lowest of all limits."""
        return _thousandth(self._read("nvmlDeviceGetEnforcedPowerLimit", self._gpu))

    def temperature_celsius(self) -> int | None:
        """Temperature of the GPU die."""
        temperature = self._read("nvmlDeviceGetTemperatureV", self._gpu, TEMPERATURE_GPU)
        if temperature is None:  # its name before driver 575
            temperature = self._read("nvmlDeviceGetTemperature", self._gpu, TEMPERATURE_GPU)
        return temperature

    def clocks_event_reasons(self) -> frozenset[str] | None:
        """What limits the clocks, by the names in CLOCKS_EVENT_REASONS; empty if nothing does."""
        bits = self._read("nvmlDeviceGetCurrentClocksEventReasons", self._gpu)
        if bits is None:  # its name before driver 535
            bits = self._read("nvmlDeviceGetCurrentClocksThrottleReasons", self._gpu)
        if bits is None:
            return None
        named = {name for bit, name in CLOCKS_EVENT_REASONS.items() if bits & bit}
        unnamed = bits & ~sum(CLOCKS_EVENT_REASONS)
        return frozenset(named | {f"unknown_{unnamed:#x}"} if unnamed else named)

    def violation_nanoseconds(self) -> dict[str, int | None]:
        """Time for which each policy has limited the clocks since the driver was loaded."""
        counters = {}
        for name, policy in VIOLATION_POLICIES.items():
            status = self._read("nvmlDeviceGetViolationStatus", self._gpu, policy)
            counters[name] = None if status is None else _counter(status.violationTime)
        return counters

    def compute_pids(self) -> frozenset[int] | None:
        """Processes with a compute context on the GPU or MIG instance."""
        processes = self._read("nvmlDeviceGetComputeRunningProcesses_v3", self._handle)
        if processes is None:  # driver 470 and older
            processes = self._read("nvmlDeviceGetComputeRunningProcesses_v2", self._handle)
        return None if processes is None else frozenset(process.pid for process in processes)

    def _read(self, function: str, *arguments):
        call = getattr(self._library, function, None)
        if call is None or self.lost:
            return None
        try:
            return call(*arguments)
        except self._library.NVMLError as error:
            self.lost = LOST.get(getattr(error, "value", None))
            return None


def open_device(uuid: str | None, index: int = 0) -> Device | NoTelemetry:
    """Open the device with this UUID (with or without `GPU-` or `MIG-`), or without a UUID the one at `index`.

    Give the UUID if it is known (torch.cuda.get_device_properties has it since torch 2.4): NVML orders GPUs by PCI bus and
    ignores CUDA_VISIBLE_DEVICES, so that its index may differ from torch's. A missing library, driver or device is
    returned as NoTelemetry, not raised.
    """
    try:
        library = importlib.import_module("pynvml")
    except ImportError as error:
        return NoTelemetry(f"the Python package nvidia-ml-py cannot be imported ({error})")
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        return NoTelemetry(f"the NVIDIA driver does not respond ({error})")
    errors = []
    for candidate in (None,) if uuid is None else (uuid, f"GPU-{uuid}", f"MIG-{uuid}"):
        try:
            if candidate is None:
                return Device(library, library.nvmlDeviceGetHandleByIndex(index))
            return Device(library, library.nvmlDeviceGetHandleByUUID(candidate))
        except library.NVMLError as error:
            errors.append(str(error))
    library.nvmlShutdown()
    return NoTelemetry(f"NVML has no device {index if uuid is None else uuid} ({errors[0]})")


def open_visible_device(index: int = 0) -> Device | NoTelemetry:
    """Open CUDA's device `index` under this CUDA_VISIBLE_DEVICES, on a machine with identical GPUs.

    CUDA orders different GPUs by speed unless CUDA_DEVICE_ORDER=PCI_BUS_ID: only the UUID is then reliable.
    Source: NVIDIA, CUDA C++ Programming Guide, environment variables: the list ends at its first invalid entry.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return open_device(None, index)
    entries = [entry.strip() for entry in visible.split(",")]
    valid = list(itertools.takewhile(lambda entry: entry.isdigit() or entry[:4] in ("GPU-", "MIG-"), entries))
    if index >= len(valid):
        return NoTelemetry(f"CUDA_VISIBLE_DEVICES={visible!r} leaves no device {index}")
    return open_device(None, int(valid[index])) if valid[index].isdigit() else open_device(valid[index])


def in_initial_pid_namespace() -> bool:
    """Whether this process has the host's process ids; True if unreadable."""
    try:
        return os.readlink("/proc/self/ns/pid") == INITIAL_PID_NAMESPACE
    except OSError:
        return True


def _text(value) -> str | None:
    return value.decode() if isinstance(value, bytes) else value  # bytes: nvidia-ml-py before 11.515


def _thousandth(value: float | None) -> float | None:
    return None if value is None else value / 1000


def _counter(value: int | None) -> int | None:
    return None if value is None or value >= NOT_AVAILABLE else value
