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
    # The first of nested levels, as in "4,2"; like OpenMP, what is no number is left out.
    given = re.fullmatch(r"\s*0*([1-9]\d*)\s*(,.*)?", environ.get(USERS_NUMBER, ""))
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
    for group in cgroup_folders(root, "cpu"):
        values = _text(group / "cpu.max").split()
        values = values or [_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")]
        if len(values) == 2 and all(value.isdecimal() and int(value) for value in values):
            limits.append(int(values[0]) / int(values[1]))
    return min(limits, default=None)


def cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Folders of this process's cgroup and its ancestors, under cgroup v2 and v1.

    /proc may hold the host's path of a container's cgroup, so that some of the folders do not exist.
    """
    folders = []
    for line in _text(root / "proc/self/cgroup").splitlines():
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


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
