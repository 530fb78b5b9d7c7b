"""Machine facts, from a planted /proc and /sys."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from perf.machine.facts import cpu_facts

MEMINFO = {
    "MemTotal": 1000,
    "MemFree": 300,
    "MemAvailable": 400,
    "Buffers": 0,
    "Cached": 100,
    "SReclaimable": 0,
    "Shmem": 0,
}
SWAP = {"SwapTotal": 50, "SwapFree": 20}
MEMINFO_TEXT = "".join(f"{name}: {number} kB\n" for name, number in {**MEMINFO, **SWAP}.items())
PSUTIL = ("virtual_memory", "swap_memory", "cpu_times", "getloadavg")


@pytest.fixture(autouse=True)
def _psutil_reads_the_planted_files(monkeypatch, tmp_path):
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
    monkeypatch.setattr(psutil, "getloadavg", lambda: (1.5, 0.35, 0.21))


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


X86 = """processor\t: 0
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9654
stepping\t: 1
"""
ARM = """processor\t: 0
CPU implementer\t: 0x41
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1
"""


@pytest.mark.parametrize(
    "text, processor",
    [
        (X86, "family 25, model 17, stepping 1"),
        (ARM, "implementer 0x41, variant 0x3, part 0xd0c, revision 1"),
        ("", None),
    ],
)
def test_processors_of_one_name_are_told_apart(tmp_path, text, processor):
    """Virtual machines often hide the model's name."""
    plant(tmp_path, {"proc/cpuinfo": text})
    assert cpu_facts(tmp_path).processor == processor


def test_cpu_facts(tmp_path):
    plant(
        tmp_path,
        {
            "proc/cpuinfo": f"{X86}\nprocessor\t: 1\nmodel name\t: other\n",
            "proc/meminfo": MEMINFO_TEXT,
            "proc/vmstat": "pswpin 0\npswpout 0\n",
            "proc/stat": "cpu  10 0 20 60 5 0 0 5 3 0\ncpu0 1 1 1 1\n",
            "proc/self/cgroup": "0::/docker/abc\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
            "sys/fs/cgroup/docker/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/docker/abc/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/docker/memory.max": f"{300 * 1024}\n",
            "sys/fs/cgroup/docker/memory.current": f"{200 * 1024}\n",
            "sys/fs/cgroup/docker/memory.stat": f"anon 5\ninactive_file {50 * 1024}\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
            "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "performance\n",
            "sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc\n",
        },
    )
    facts = cpu_facts(tmp_path)
    assert facts.name == "AMD EPYC 9654" and facts.load_average_1_minute == 1.5 and facts.clocksource == "tsc"
    assert facts.governors == ("performance", "powersave")
    assert facts.cgroup_cpus == 1.5  # the tightest of the groups above
    assert facts.memory_bytes == 1000 * 1024 and facts.swap_used_bytes == 30 * 1024
    assert facts.memory_available_bytes == 150 * 1024  # what the group leaves, file cache counted as free
    ticks = os.sysconf("SC_CLK_TCK")
    assert (facts.cpu_seconds, facts.steal_seconds) == pytest.approx((100 / ticks, 5 / ticks))
    assert facts.cores >= 1


def test_cgroup_version_1_with_a_path_of_the_host(tmp_path):
    plant(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/kubepods/x\n1:cpu,cpuacct:/kubepods/x\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
            "proc/meminfo": MEMINFO_TEXT,
        },
    )
    facts = cpu_facts(tmp_path)
    assert facts.cgroup_cpus == 0.5
    assert facts.memory_available_bytes == 400 * 1024


@pytest.mark.parametrize("content", [None, "", "malformed\n", "\x00\xff:"])
def test_unreadable_machine_facts_are_none(tmp_path, monkeypatch, content):
    names = ["cpuinfo", "meminfo", "stat", "self/cgroup"]
    plant(tmp_path, {} if content is None else {f"proc/{name}": content for name in names})
    monkeypatch.setattr(psutil, "getloadavg", unreadable(OSError()))
    monkeypatch.setattr(psutil, "swap_memory", unreadable(OSError()))  # else it falls back to a system call
    facts = replace(cpu_facts(tmp_path), name=None, cores=None)  # the interpreter has another source for these
    assert facts == type(facts)()


def unreadable(error: Exception):
    def function():
        raise error

    return function


@pytest.mark.parametrize(
    "error",
    [
        OSError(),
        PermissionError(),
        KeyError("MemTotal:"),
        IndexError(),
        ValueError(),
        psutil.Error(),
        NotImplementedError(),
    ],
)
def test_errors_of_psutil_are_none(tmp_path, monkeypatch, error):
    for name in PSUTIL:
        monkeypatch.setattr(psutil, name, unreadable(error))
    facts = replace(cpu_facts(tmp_path), name=None, cores=None)
    assert facts == type(facts)()


def test_no_cgroup_limit_is_none(tmp_path):
    plant(tmp_path, {"proc/self/cgroup": "0::/\n1:cpu:/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"})
    plant(tmp_path / "sys/fs/cgroup/cpu", {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"})
    assert cpu_facts(tmp_path).cgroup_cpus is None
