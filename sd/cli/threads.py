"""The number of CPU threads of a command line: physical cores that the process may use, within the quota of its cgroups.

PyTorch starts a thread for each logical CPU of its affinity. Two threads of one core share its vector units, and threads beyond a
container's quota are stopped in the middle of a layer, while the others wait.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch


def set_threads(environ: Mapping[str, str], root: Path = Path("/")) -> str:
    """Set torch's threads unless OMP_NUM_THREADS does; return the line that tells the number and its origin."""
    if environ.get("OMP_NUM_THREADS"):
        return f"CPU threads: {torch.get_num_threads()} (OMP_NUM_THREADS)"
    cores, quota = physical_cores(root), cpu_quota(root)
    threads, origin = cores, f"{cores} physical cores"
    if quota is not None and math.ceil(quota) < cores:
        threads, origin = math.ceil(quota), f"the cgroup's quota of {quota:g} CPUs"
    torch.set_num_threads(threads)
    return f"CPU threads: {threads} ({origin}; OMP_NUM_THREADS sets another number)"


def physical_cores(root: Path) -> int:
    """Physical cores among the CPUs that this process may use; each CPU counts where the system does not list siblings."""
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
    topology = root / "sys/devices/system/cpu"
    return len({_text(topology / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus})


def cpu_quota(root: Path) -> float | None:
    """The smallest CPU limit of the process's cgroup and its ancestors, in CPUs; None without a limit (cgroups(7))."""
    limits = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy != "0" and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("" if hierarchy == "0" else "cpu")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder != top and top not in folder.parents:
                break
            values = _text(folder / "cpu.max").split()
            values = values or [_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")]
            if len(values) == 2 and all(value.isdecimal() and int(value) for value in values):
                limits.append(int(values[0]) / int(values[1]))
    return min(limits, default=None)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
