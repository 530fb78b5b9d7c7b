"""CPU threads of the command lines: physical cores in the affinity, the quota of a cgroup, and the user's own number."""

from __future__ import annotations

import pytest
import torch

from sd import cpus
from sd.cli.setup import set_threads


@pytest.fixture(autouse=True)
def _restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that makes a machine of CPUs by their siblings, with a cgroup's files."""

    def make(siblings, cgroup="", files=None):
        for cpu, text in siblings.items():
            folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(text)
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
        for name, text in (files or {}).items():
            file = tmp_path / "sys/fs/cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        monkeypatch.setattr(cpus.os, "sched_getaffinity", lambda _: set(siblings), raising=False)
        return tmp_path

    return make


HYPERTHREADS = {0: "0,2\n", 1: "1,3\n", 2: "0,2\n", 3: "1,3\n"}


def test_threads_of_one_core_count_once(machine):
    line = set_threads({}, machine(HYPERTHREADS))
    assert torch.get_num_threads() == 2
    assert line == "CPU threads: 2 (2 physical cores; OMP_NUM_THREADS sets another number)"


def test_unknown_siblings_count_as_cores(machine):
    assert cpus.physical_cores(machine(HYPERTHREADS) / "elsewhere") == 4


@pytest.mark.parametrize(
    "cgroup, files, quota",
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000", "cpu.max": "400000 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("4:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "100000", "cpu/x/cpu.cfs_period_us": "100000"}, 1.0),
        ("4:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, None),
        ("4:memory:/x\n", {}, None),
        ("malformed\n", {}, None),
    ],
)
def test_quota(machine, cgroup, files, quota):
    root = machine({cpu: str(cpu) for cpu in range(4)}, cgroup, files)
    assert cpus.cpu_quota(root) == quota
    set_threads({}, root)
    assert torch.get_num_threads() == {1.5: 2, 1.0: 1, None: 4}[quota]


def test_the_users_number_stays(machine):
    torch.set_num_threads(3)  # as MKL_NUM_THREADS would
    assert set_threads({"OMP_NUM_THREADS": "4"}, machine(HYPERTHREADS)) == "CPU threads: 3 (OMP_NUM_THREADS)"
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("value, number", [("3", 3), ("4,2", 4), (" 08", 8), ("0", 2), ("3x", 2), ("many", 2), ("", 2)])
def test_number_of_the_environment(machine, value, number):
    assert cpus.default_threads({"OMP_NUM_THREADS": value}, machine(HYPERTHREADS))[0] == number
