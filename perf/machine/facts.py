"""Hardware and load of this machine. None stands for a value that could not be read. Imports neither torch nor pytest."""

from __future__ import annotations

import os
import platform
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

NO_LIMIT_BYTES = 1 << 60  # cgroup v1 reports "no limit" as a number near 2^63
T = TypeVar("T")


@dataclass(frozen=True)
class CpuFacts:
    """The CPU and memory of this machine.

    processor: tells processors of one name apart, since virtual machines often hide the model: "family 25, model 17,
    stepping 1". cores: usable by this process. cgroup_cpus: the CPU limit of its cgroups. cpu_seconds, steal_seconds:
    since boot, over all CPUs; the difference of two readings gives the share of time that the hypervisor gave to other
    machines.
    """

    name: str | None = None
    processor: str | None = None
    cores: int | None = None
    governors: tuple[str, ...] | None = None
    load_average_1_minute: float | None = None
    cgroup_cpus: float | None = None
    memory_bytes: int | None = None
    memory_available_bytes: int | None = None
    swap_used_bytes: int | None = None
    cpu_seconds: float | None = None
    steal_seconds: float | None = None
    clocksource: str | None = None


def cpu_facts(root: Path | str = "/") -> CpuFacts:
    """Read the facts of this machine from psutil and, for what psutil lacks, from `proc` and `sys` under `root`.

    Source: proc(5), cgroups(7), Linux cpufreq.
    """
    from sd.cpus import cpu_quota  # not above: a worker imports this module beside the `sd` of another commit

    root = Path(root)
    memory, swap, times, load = map(
        _read, (psutil.virtual_memory, psutil.swap_memory, psutil.cpu_times, psutil.getloadavg)
    )
    cpuinfo = _cpuinfo(root)
    return CpuFacts(
        name=_cpu_name(cpuinfo),
        processor=_processor(cpuinfo),
        cores=_cores(),
        governors=_governors(root),
        load_average_1_minute=load[0] if load else None,
        cgroup_cpus=cpu_quota(root),
        memory_bytes=memory.total if memory else None,
        memory_available_bytes=min([memory.available, *_cgroup_free_bytes(root)]) if memory else None,
        swap_used_bytes=swap.used if swap else None,
        cpu_seconds=sum(times[:8]) if times else None,  # the later fields, of guests, are included in `user`
        steal_seconds=getattr(times, "steal", None),
        clocksource=_text(root / "sys/devices/system/clocksource/clocksource0/current_clocksource"),
    )


def _read(function: Callable[[], T]) -> T | None:
    """Call a function of psutil; None if the system lacks or hides the files that it reads."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # psutil warns of every file that a container hides
            return function()
    # psutil parses these files without validation, so that malformed ones raise any of the built-in errors.
    except (OSError, psutil.Error, LookupError, ValueError, TypeError, AttributeError, NotImplementedError):
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _cores() -> int | None:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return psutil.cpu_count()


def _cpuinfo(root: Path) -> dict[str, str]:
    lines = [line.partition(":") for line in (_text(root / "proc/cpuinfo") or "").splitlines()]
    return {key.strip(): value.strip() for key, _, value in reversed(lines)}  # reversed: the first of equal keys stays


def _cpu_name(cpuinfo: dict[str, str]) -> str | None:
    names = map(cpuinfo.get, ("model name", "Model", "Hardware"))  # x86, then ARM
    return next(filter(None, names), None) or _apple_name() or platform.processor() or platform.machine() or None


def _apple_name() -> str | None:
    """Such as `Apple M2 Pro`, where platform.processor() is only `arm`."""
    if platform.system() != "Darwin":
        return None
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _processor(cpuinfo: dict[str, str]) -> str | None:
    if "cpu family" in cpuinfo:  # x86; the words are those of saved_run._processor
        return f"family {cpuinfo['cpu family']}, model {cpuinfo.get('model')}, stepping {cpuinfo.get('stepping')}"
    arm = ("CPU implementer", "CPU variant", "CPU part", "CPU revision")
    return ", ".join(f"{key[4:]} {cpuinfo[key]}" for key in arm if key in cpuinfo) or None


def _governors(root: Path) -> tuple[str, ...] | None:
    files = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    return tuple(sorted(set(filter(None, map(_text, files))))) or None


def _cgroup_free_bytes(root: Path) -> list[int]:
    """The memory that each cgroup with a limit leaves, counting reclaimable file cache as free."""
    from sd.cpus import cgroup_folders  # as in cpu_facts

    free = []
    for folder in cgroup_folders(root, "memory"):
        for limit_file, usage_file, cache_key in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = _number(_text(folder / limit_file)), _number(_text(folder / usage_file))
            if limit is not None and usage is not None and limit < NO_LIMIT_BYTES:
                lines = (line.split() for line in (_text(folder / "memory.stat") or "").splitlines())
                cache = sum(_number(line[-1]) or 0 for line in lines if line[:1] == [cache_key])
                free.append(max(0, int(limit - usage + cache)))
    return free
