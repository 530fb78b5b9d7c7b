"""What this machine is and how busy it is, in facts. None is what could not be read. Imports neither torch nor pytest."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from perf.machine.nvml import Device, NoTelemetry

NO_LIMIT_BYTES = 1 << 60  # cgroup v1 says "no limit" with a number near 2^63


@dataclass(frozen=True)
class GpuFacts:
    """One GPU or MIG instance. `mig_mode` is None for models that cannot be partitioned."""

    name: str | None = None
    uuid: str | None = None
    driver: str | None = None
    cuda_driver: tuple[int, int] | None = None
    compute_capability: tuple[int, int] | None = None
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
class CpuFacts:
    """The CPU side. `cores` is what this process may use; `cgroup_cpus` is its container's limit in CPUs.

    `jiffies` and `steal_jiffies` count since boot, over all CPUs: the difference of two readings gives the share of
    time that the hypervisor gave to other machines.
    """

    name: str | None = None
    cores: int | None = None
    governors: tuple[str, ...] | None = None
    load_average_1_minute: float | None = None
    cgroup_cpus: float | None = None
    memory_bytes: int | None = None
    memory_available_bytes: int | None = None
    swap_used_bytes: int | None = None
    jiffies: int | None = None
    steal_jiffies: int | None = None
    clocksource: str | None = None


def gpu_facts(device: Device | NoTelemetry) -> GpuFacts:
    """The facts of a device that perf.machine.nvml.open_device gave; of a NoTelemetry all are None."""
    if isinstance(device, NoTelemetry):
        return GpuFacts()
    memory_bytes, memory_used_bytes = device.memory_bytes()
    application, application_default = device.application_sm_clock_mhz()
    return GpuFacts(
        name=device.name(),
        uuid=device.uuid(),
        driver=device.driver(),
        cuda_driver=device.cuda_driver(),
        compute_capability=device.compute_capability(),
        memory_bytes=memory_bytes,
        memory_used_bytes=memory_used_bytes,
        power_limit_watts=device.power_limit_watts(),
        power_limit_default_watts=device.power_limit_default_watts(),
        sm_clock_mhz=device.sm_clock_mhz(),
        sm_clock_max_mhz=device.sm_clock_max_mhz(),
        memory_clock_max_mhz=device.memory_clock_max_mhz(),
        application_sm_clock_mhz=application,
        application_sm_clock_default_mhz=application_default,
        clocks_event_reasons=device.clocks_event_reasons(),
        temperature_celsius=device.temperature_celsius(),
        temperature_slowdown_celsius=device.temperature_slowdown_celsius(),
        persistence_mode=device.persistence_mode(),
        mig_mode=device.mig_mode(),
        is_mig_instance=device.is_mig_instance,
        compute_pids=device.compute_pids(),
    )


def cpu_facts(root: Path | str = "/") -> CpuFacts:
    """The facts of this machine, from `proc` and `sys` under `root`. Source: proc(5), cgroups(7), Linux cpufreq."""
    root = Path(root)
    memory = _fields(root / "proc/meminfo")
    swap_total, swap_free = _kibibytes(memory, "SwapTotal"), _kibibytes(memory, "SwapFree")
    available = _kibibytes(memory, "MemAvailable")
    limit = _cgroup_memory_free_bytes(root)
    jiffies = _jiffies(root)
    return CpuFacts(
        name=_cpu_name(root),
        cores=_cores(),
        governors=_governors(root),
        load_average_1_minute=_number((_text(root / "proc/loadavg") or "").split()[:1]),
        cgroup_cpus=_cgroup_cpus(root),
        memory_bytes=_kibibytes(memory, "MemTotal"),
        memory_available_bytes=available if limit is None or available is None else min(limit, available),
        swap_used_bytes=None if swap_total is None or swap_free is None else swap_total - swap_free,
        jiffies=sum(jiffies[:8]) if jiffies else None,  # the later columns, guests, are in `user` already
        steal_jiffies=jiffies[7] if len(jiffies) > 7 else None,
        clocksource=_text(root / "sys/devices/system/clocksource/clocksource0/current_clocksource"),
    )


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None


def _number(texts: Collection[str]) -> float | None:
    """The number that the only text is."""
    try:
        (text,) = texts
        return float(text)
    except ValueError:
        return None


def _fields(path: Path) -> dict[str, str]:
    """`key: value` lines; of several with one key the first."""
    found: dict[str, str] = {}
    for line in (_text(path) or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    return found


def _kibibytes(fields: dict[str, str], key: str) -> int | None:
    number = _number(fields.get(key, "").split()[:1])
    return None if number is None else int(number) * 1024


def _cores() -> int | None:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count()


def _cpu_name(root: Path) -> str | None:
    fields = _fields(root / "proc/cpuinfo")
    for key in ("model name", "Model", "Hardware"):  # x86; then what ARM kernels write, where they write any
        if fields.get(key):
            return fields[key]
    return platform.processor() or platform.machine() or None


def _governors(root: Path) -> tuple[str, ...] | None:
    files = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    names = {text for text in map(_text, files) if text}
    return tuple(sorted(names)) or None


def _jiffies(root: Path) -> list[int]:
    line = (_text(root / "proc/stat") or "").partition("\n")[0].split()
    return [int(field) for field in line[1:] if field.isdigit()] if line[:1] == ["cpu"] else []


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Folders of this process's group and those above it, with the limits of version 2 and of version 1.

    A container sees its own group at the top, but may have the host's path to it in /proc: folders that are not there
    are no error.
    """
    folders = []
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        group = top / path.lstrip("/")
        folders += [group, *(parent for parent in group.parents if parent == top or top in parent.parents)]
    return folders


def _cgroup_cpus(root: Path) -> float | None:
    limits = []
    for folder in _cgroup_folders(root, "cpu"):
        texts = (_text(folder / "cpu.max") or "").split()
        if len(texts) != 2:
            texts = [_text(folder / "cpu.cfs_quota_us") or "", _text(folder / "cpu.cfs_period_us") or ""]
        quota, period = _number(texts[:1]), _number(texts[1:])  # without a limit the quota is "max", or -1
        if quota is not None and period is not None and quota > 0 and period > 0:
            limits.append(quota / period)
    return min(limits, default=None)


def _cgroup_memory_free_bytes(root: Path) -> int | None:
    """What the tightest group leaves, where file cache that can be dropped counts as free; None without a limit."""
    free = []
    for folder in _cgroup_folders(root, "memory"):
        for limit_file, usage_file, cache_key in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = _number([_text(folder / limit_file) or ""]), _number([_text(folder / usage_file) or ""])
            if limit is not None and usage is not None and limit < NO_LIMIT_BYTES:
                lines = (line.split() for line in (_text(folder / "memory.stat") or "").splitlines())
                cache = sum(_number(line[1:]) or 0 for line in lines if line[:1] == [cache_key])
                free.append(max(0, int(limit - usage + cache)))
    return min(free, default=None)
