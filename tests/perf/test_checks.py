"""Checks of `python -m perf doctor` on given facts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from fake_machine import GIB, H200, HELD, LATER, QUIET, STACK

from perf.commands import checks
from perf.commands.checks import BUSY, CANNOT, OK, WARNING
from perf.commands.torch_probe import StackFacts
from perf.machine.facts import CpuFacts
from perf.machine.nvml import GpuFacts


def statuses(results: list[checks.Check]) -> dict[str, str]:
    return {check.name: check.status for check in results}


def the(name: str, results: list[checks.Check]) -> checks.Check:
    (check,) = (check for check in results if check.name == name)
    return check


# --- GPU


def test_quiet_gpu_passes():
    assert set(statuses(checks.gpu_checks(H200)).values()) == {OK}


def test_unreadable_gpu_facts_are_warnings():
    status = statuses(checks.gpu_checks(GpuFacts(name="NVIDIA P100", uuid="GPU-2")))
    assert status.pop("gpu") == OK and status.pop("mig") == OK
    assert set(status.values()) == {WARNING}


@pytest.mark.parametrize(
    "name, changes, status, words",
    [
        ("persistence", {"persistence_mode": False}, WARNING, "nvidia-smi -pm 1"),
        ("clocks", {"clocks_event_reasons": frozenset()}, WARNING, "SM 345 of 1980 MHz, free"),
        (
            "clocks",
            {
                "clocks_event_reasons": frozenset(),
                "application_sm_clock_mhz": 1500,
                "application_sm_clock_default_mhz": 1980,
            },
            OK,
            "applications clock 1500 MHz (default 1980)",
        ),
        ("power limit", {"power_limit_watts": 500.0}, WARNING, "500 W, below the card's 700 W"),
        ("power limit", {"power_limit_default_watts": None}, OK, "700 W"),
        ("temperature", {"temperature_celsius": 74}, OK, "74 °C, slows down at 90 °C"),
        ("temperature", {"temperature_celsius": 75}, WARNING, "let it cool"),
        ("temperature", {"temperature_celsius": 80, "temperature_slowdown_celsius": None}, WARNING, "80 °C"),
        ("throttling", {"clocks_event_reasons": HELD | {"hw_slowdown", "gpu_idle"}}, CANNOT, " hw_slowdown;"),
        ("throttling", {"clocks_event_reasons": HELD | {"sw_power_cap"}}, OK, "sw_power_cap"),
        ("processes", {"compute_pids": frozenset({12, 7})}, CANNOT, "in use by pid 7, 12"),
        ("mig", {"mig_mode": True}, WARNING, "CUDA_VISIBLE_DEVICES"),
        ("mig", {"is_mig_instance": True, "mig_mode": True}, WARNING, "a MIG instance"),
        ("mig", {"mig_mode": None}, OK, "not on this model"),
    ],
)
def test_gpu_problem(name, changes, status, words):
    results = checks.gpu_checks(replace(H200, **changes))
    check = the(name, results)
    assert check.status == status and words in str(check) and "\n" not in str(check)
    assert {other: state for other, state in statuses(results).items() if other != name and state != OK} == {}


@pytest.mark.parametrize(
    "stack, required, status, words",
    [
        (StackFacts(), False, WARNING, "only the CPU can be measured"),
        (StackFacts(), True, CANNOT, "--device cpu"),
        (STACK, True, WARNING, "unseen by NVML: no driver"),
    ],
)
def test_no_gpu(stack, required, status, words):
    check = checks.no_gpu_check("no driver", stack, required)
    assert check.status == status and words in str(check)


# --- software stack


def test_compatible_stack_passes():
    assert set(statuses(checks.stack_checks(STACK, H200)).values()) == {OK}
    on_cpu = replace(STACK, device=None, uuid=None, capability=None, arch_list=())
    assert statuses(checks.stack_checks(on_cpu, GpuFacts())) == {"torch": OK, "xformers": OK}
    assert statuses(checks.stack_checks(STACK, None)) == {"torch": OK, "xformers": OK}


@pytest.mark.parametrize(
    "name, changes, status, words",
    [
        ("torch", {"torch": None, "torch_imported": False}, CANNOT, "not in Python 3.11.7"),
        ("cuda", {"cuda": "14.1"}, CANNOT, "built for CUDA 14.1, the driver ends at 13.0"),
        ("cuda", {"cuda": "12.1"}, OK, "cuDNN 92600"),
        ("cuda", {"device": None, "cuda_warning": "driver too old"}, CANNOT, "torch sees no GPU (driver too old)"),
        ("architecture", {"arch_list": ("sm_37", "sm_86")}, CANNOT, "capability 9.0, torch has code for sm_37 sm_86"),
        ("triton", {"triton": None}, WARNING, "not installed"),
        ("triton", {"triton_error": "ImportError: libcuda"}, WARNING, "ImportError: libcuda"),
        ("xformers", {"xformers": None}, WARNING, "not installed"),
        ("xformers", {"xformers_requires": ("torch==2.6.0",)}, WARNING, "is built for torch==2.6.0, and this is torch"),
        ("xformers", {"xformers_requires": ("torch==2.15.0", "numpy<2", "??")}, OK, "compatible with"),
        ("xformers", {"xformers_error": "OSError: x"}, WARNING, "does not import: OSError: x"),
        ("imports", {"error": "it was ended by signal 11"}, WARNING, "Triton or xFormers did not import"),
    ],
)
def test_incompatible_stack(name, changes, status, words):
    results = checks.stack_checks(replace(STACK, **changes), H200)
    check = the(name, results)
    assert check.status == status and words in str(check)
    assert {other: state for other, state in statuses(results).items() if other != name and state != OK} == {}


def test_compiler_check_uses_inductors_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert checks.compiler_check().status == WARNING
    (tmp_path / "g++").write_text("")
    (tmp_path / "g++").chmod(0o755)
    assert checks.compiler_check().fact == str(tmp_path / "g++")


# --- CPU and suite


def test_quiet_machine_passes():
    assert set(statuses(checks.cpu_checks(QUIET, LATER)).values()) == {OK}


def test_unreadable_machine_facts_are_warnings():
    status = statuses(checks.cpu_checks(CpuFacts(), CpuFacts()))
    assert status.pop("cpu limit") == OK  # no cgroup is no limit
    assert set(status.values()) == {WARNING}


@pytest.mark.parametrize(
    "name, changes, status, words",
    [
        ("governor", {"governors": ("performance", "powersave")}, WARNING, "cpupower"),
        ("load", {"load_average_1_minute": 2.0}, OK, "2.00 on 8 cores"),
        ("load", {"load_average_1_minute": 2.1}, WARNING, "2.10 on 8 cores"),
        ("load", {"load_average_1_minute": 7.9}, WARNING, "7.90 on 8 cores"),
        ("load", {"load_average_1_minute": 8.0}, BUSY, "8.00 on 8 cores"),
        ("cpu limit", {"cgroup_cpus": 2.5}, WARNING, "OMP_NUM_THREADS=3"),
        ("cpu limit", {"cgroup_cpus": 0.5}, WARNING, "OMP_NUM_THREADS=1"),
        ("cpu limit", {"cgroup_cpus": 8.0}, OK, "8 CPUs"),
        ("memory", {"memory_available_bytes": 4 * GIB}, WARNING, "4.0 GiB"),
        ("memory", {"memory_available_bytes": GIB // 2}, CANNOT, "0.5 GiB"),
        ("swap", {"swap_used_bytes": GIB}, WARNING, "1.0 GiB in use"),
    ],
)
def test_machine_problem(name, changes, status, words):
    results = checks.cpu_checks(replace(QUIET, **changes), LATER)
    check = the(name, results)
    assert check.status == status and words in str(check)
    assert {other: state for other, state in statuses(results).items() if other != name and state != OK} == {}


@pytest.mark.parametrize("stolen, status", [(10, OK), (11, WARNING)])
def test_steal_is_the_difference_of_two_readings(stolen, status):
    before = replace(QUIET, steal_seconds=500)  # since boot: long ago
    check = the("steal", checks.cpu_checks(before, replace(LATER, steal_seconds=500 + stolen)))
    assert check.status == status and f"{stolen / 1000:.1%}" in check.fact


@pytest.mark.parametrize("free, status", [(2 * GIB, OK), (GIB // 2, WARNING), (GIB // 32, CANNOT)])
def test_free_disk_space(monkeypatch, tmp_path, free, status):
    monkeypatch.setattr("perf.commands.checks.shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    check = the("storage", checks.suite_checks(tmp_path / "not" / "made" / "yet"))
    assert check.status == status
    assert not (tmp_path / "not").exists()


def test_storage_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    check = the("storage", checks.suite_checks(tmp_path / "file" / "below"))
    assert check.status == CANNOT and "is not a writable folder" in check.fact


@pytest.mark.parametrize("version, status", [("5.3.1", OK), ("4.0.0", CANNOT), (None, CANNOT)])
def test_version_of_pytest_benchmark(monkeypatch, tmp_path, version, status):
    monkeypatch.setattr("perf.commands.checks.package_version", lambda package: version)
    assert the("pytest-benchmark", checks.suite_checks(tmp_path)).status == status


def test_slow_clock_and_missing_git(monkeypatch, tmp_path):
    ticks = iter(range(10_000))
    monkeypatch.setattr("perf.commands.checks.time.perf_counter", lambda: next(ticks) // 100 * 0.01)
    monkeypatch.setenv("PATH", str(tmp_path))
    results = checks.suite_checks(tmp_path)
    assert the("clock", results).status == WARNING and "steps of 10000000 ns" in the("clock", results).fact
    assert the("git", results).status == WARNING
