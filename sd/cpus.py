"""CPUs that this process may use: physical cores of its affinity, the quota of its cgroups, and the threads that follow.

PyTorch starts a thread for each logical CPU of its affinity. Two threads of one core share its vector units, and threads beyond a
container's quota are stopped in the middle of a layer, while the others wait. Imports no torch.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

USERS_NUMBER = "OMP_NUM_THREADS"


def default_threads(environ: Mapping[str, str], root: Path = Path("/")) -> tuple[int, str]:
    """Threads for torch, and where the number is from: OMP_NUM_THREADS, else physical cores, within the cgroups' quota."""
    given = re.fullmatch(
        r"\s*0*([1-9]\d*)\s*(,.*)?", environ.get(USERS_NUMBER, "")
    )  # of nested levels the first, as in "4,2"
    if given:
        return int(given[1]), USERS_NUMBER
    cores, quota = physical_cores(root), cpu_quota(root)
    if quota is not None and math.ceil(quota) < cores:
        return math.ceil(quota), f"the cgroup's quota of {quota:g} CPUs"
    return cores, f"{cores} physical cores"


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
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
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
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
