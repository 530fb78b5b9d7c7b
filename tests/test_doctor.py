"""Is this machine fit to measure? The judgement from given facts, and the command with a fake torch and a fake NVML."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_nvml import LIBRARY_NOT_FOUND, FakeNvml

from perf import checks, doctor
from perf.checks import CANNOT, OK, WARNING
from perf.machine import CpuFacts, GpuFacts
from perf.stack import StackFacts, compile_trial, runs_on, stack_facts

GIB = 1 << 30
HELD = frozenset({"applications_clocks_setting"})
H200 = GpuFacts(
    name="NVIDIA H200",
    uuid="GPU-1",
    driver="580.65.06",
    cuda_driver=(13, 0),
    compute_capability=(9, 0),
    memory_bytes=141 * GIB,
    memory_used_bytes=GIB,
    power_limit_watts=700.0,
    power_limit_default_watts=700.0,
    sm_clock_mhz=345,
    sm_clock_max_mhz=1980,
    clocks_event_reasons=HELD,
    temperature_celsius=31,
    temperature_slowdown_celsius=90,
    persistence_mode=True,
    mig_mode=False,
    compute_pids=frozenset(),
)
STACK = StackFacts(
    python="3.11.7",
    torch="2.15.0+cu132",
    torch_imported=True,
    cuda="13.2",
    cudnn=92600,
    device="NVIDIA H200",
    uuid="1",
    capability=(9, 0),
    arch_list=("sm_75", "sm_90"),
    triton="3.9.0",
    xformers="0.0.35",
    xformers_requires=("torch>=2.10", "numpy"),
)
QUIET = CpuFacts(
    name="AMD EPYC",
    cores=8,
    governors=("performance",),
    load_average_1_minute=0.1,
    memory_bytes=64 * GIB,
    memory_available_bytes=60 * GIB,
    swap_used_bytes=0,
    jiffies=1000,
    steal_jiffies=0,
)
LATER = replace(QUIET, jiffies=2000)
# A package that stands for torch in the process that is asked, so that asking takes milliseconds and can go wrong.
FAKE_TORCH = """
import math, os, signal, subprocess, sys, time
from types import SimpleNamespace as Space
__version__ = "2.99.0+cu130"
version = Space(cuda="13.0", hip=None)
cuda = Space(
    is_available=lambda: True,
    device_count=lambda: 1,
    get_device_properties=lambda index: Space(name="NVIDIA H200", uuid="11111111-2222-3333-4444-555555555555", major=9, minor=0),
    get_arch_list=lambda: ["sm_80", "sm_90"],
)
backends = Space(cudnn=Space(is_available=lambda: True, version=lambda: 91000))
linspace = lambda begin, end, count, device: 0.5
sin, cos = math.sin, math.cos
allclose = lambda a, b, atol: abs(a - b) <= atol
def compile(function):
    from torch._dynamo.utils import counters
    counters["stats"]["unique_graphs"] = 1
    for cache in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.makedirs(os.environ[cache])
    return function
"""


def stand_in(monkeypatch, folder: Path, modules: list[str]) -> None:
    """Empty modules that the asked process imports before those that are installed, which take seconds."""
    for module in modules:
        (folder / module).parent.mkdir(exist_ok=True)
        (folder / f"{module}.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.fixture
def fake_torch(tmp_path, monkeypatch):
    """Write a torch that ends with these lines, in front of the one that is installed."""
    stand_in(monkeypatch, tmp_path, ["triton/__init__", "xformers/__init__", "xformers/ops"])

    def write(lines: str = "") -> None:
        (tmp_path / "torch/_dynamo").mkdir(parents=True)
        (tmp_path / "torch/__init__.py").write_text(f"{FAKE_TORCH}\n{lines}\n")
        (tmp_path / "torch/_dynamo/__init__.py").write_text("")
        (tmp_path / "torch/_dynamo/utils.py").write_text("counters = {'stats': {'unique_graphs': 0}}\n")

    return write


def statuses(found: list[checks.Check]) -> dict[str, str]:
    return {check.name: check.status for check in found}


def the(name: str, found: list[checks.Check]) -> checks.Check:
    (check,) = (check for check in found if check.name == name)
    return check


# --- asking an interpreter


def test_the_stack_of_an_interpreter(fake_torch):
    fake_torch("print('noise'); print('[1]'); print('{\"nonsense\": 1}'); print('{')")
    facts = stack_facts()
    assert facts.torch == "2.99.0+cu130" and facts.torch_imported and facts.error is None
    assert (facts.cuda, facts.cudnn, facts.device, facts.capability) == ("13.0", 91000, "NVIDIA H200", (9, 0))
    assert facts.arch_list == ("sm_80", "sm_90") and facts.uuid == "11111111-2222-3333-4444-555555555555"
    assert facts.python == ".".join(map(str, sys.version_info[:3]))


def test_the_installed_torch_is_the_one_that_is_found(monkeypatch, tmp_path):
    stand_in(monkeypatch, tmp_path, ["xformers/__init__", "xformers/ops"])
    facts = stack_facts()
    assert facts.torch_imported and facts.torch.split("+")[0] == metadata.version("torch").split("+")[0]


def test_a_torch_that_raises_on_import(fake_torch):
    fake_torch("raise OSError('libcudart.so.13: cannot open shared object file')")
    facts = stack_facts()
    assert not facts.torch_imported and facts.error is None
    (check,) = checks.stack_checks(facts, GpuFacts())
    assert check.status == CANNOT and "does not import: OSError: libcudart.so.13" in check.fact


def test_a_torch_that_crashes_on_import(fake_torch):
    fake_torch("os.kill(os.getpid(), signal.SIGSEGV)")
    (check,) = checks.stack_checks(stack_facts(), GpuFacts())
    assert check.status == CANNOT and "it died of signal 11" in check.fact


def test_a_torch_that_hangs_is_ended_with_its_children(fake_torch, tmp_path):
    fake_torch(
        "child = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    facts = stack_facts(timeout_seconds=2)
    assert facts.error == "no answer within 2 s" and not facts.torch_imported
    child = int((tmp_path / "child").read_text())
    end = time.monotonic() + 10  # it has been killed, and dies when it next gets a core
    while _lives(child):
        assert time.monotonic() < end, f"process {child} goes on"


def _lives(pid: int) -> bool:
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        )  # dead, if not yet buried
    except OSError:
        return False


def test_modules_of_the_working_folder_are_not_taken_for_the_librarys(fake_torch, monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/json.py").write_text("raise SystemExit('perf/ has a statistics.py, for one')")
    monkeypatch.chdir(tmp_path / "here")
    fake_torch()
    assert stack_facts().error is None


def test_an_interpreter_that_is_none():
    facts = stack_facts("/nowhere/python")
    (check,) = checks.stack_checks(facts, GpuFacts())
    assert check.status == CANNOT and "/nowhere/python cannot be run" in check.fact


@pytest.mark.parametrize(
    "lines, error",
    [
        ("", None),
        ("def compile(function): return function", "torch.compile left the function as it was"),
        ("def compile(function): raise RuntimeError('no\\ncompiler')", "RuntimeError: no compiler"),
        ("allclose = lambda a, b, atol: False", "the compiled function gives other numbers"),
        ("del compile", "torch 2.99.0+cu130 has no torch.compile"),
    ],
)
def test_the_trial_of_compile(fake_torch, lines, error):
    fake_torch(lines)
    trial = compile_trial()
    assert trial.error == error
    assert (trial.seconds is None) == (error is not None)
    check = checks.compile_check(trial)
    assert check.status == (WARNING if error else OK)


@pytest.mark.parametrize(
    "capability, arch_list, fits",
    [
        ((9, 0), ("sm_37", "sm_50", "sm_80", "sm_86"), False),  # torch 2.0.1 on an H200
        ((9, 0), ("sm_80", "sm_90"), True),
        ((8, 9), ("sm_86",), True),
        ((8, 6), ("sm_89",), False),
        ((9, 0), ("sm_80", "compute_80"), True),
        ((9, 0), ("compute_100",), False),
        ((9, 0), ("sm_90a",), True),
        ((10, 3), ("sm_100a", "compute_90a"), False),
        ((10, 3), ("sm_100f",), True),
        ((12, 0), ("compute_100f",), False),
        ((12, 0), ("sm_120",), True),
        ((9, 0), (), False),
        ((9, 0), ("gfx90a", "", "sm_", "sm_x"), False),
    ],
)
def test_which_builds_run_on_which_gpu(capability, arch_list, fits):
    assert runs_on(capability, arch_list) is fits


# --- judging the GPU


def test_a_fit_gpu():
    assert set(statuses(checks.gpu_checks(H200)).values()) == {OK}


def test_an_unreadable_gpu_is_no_fit_one():
    found = statuses(checks.gpu_checks(GpuFacts(name="NVIDIA P100", uuid="GPU-2")))
    assert found.pop("gpu") == OK and found.pop("mig") == OK
    assert set(found.values()) == {WARNING}


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
def test_what_is_wrong_with_a_gpu(name, changes, status, words):
    found = checks.gpu_checks(replace(H200, **changes))
    check = the(name, found)
    assert check.status == status and words in str(check) and "\n" not in str(check)
    assert {other: state for other, state in statuses(found).items() if other != name and state != OK} == {}


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


# --- judging the stack


def test_a_fit_stack():
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
        ("xformers", {"xformers_requires": ("torch==2.15.0", "numpy<2", "??")}, OK, "goes with"),
        ("xformers", {"xformers_error": "OSError: x"}, WARNING, "does not import: OSError: x"),
        ("imports", {"error": "it died of signal 11"}, WARNING, "Triton or xFormers did not import"),
    ],
)
def test_what_does_not_go_together(name, changes, status, words):
    found = checks.stack_checks(replace(STACK, **changes), H200)
    check = the(name, found)
    assert check.status == status and words in str(check)
    assert {other: state for other, state in statuses(found).items() if other != name and state != OK} == {}


def test_the_compiler_is_inductors(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert checks.compiler_check().status == WARNING
    (tmp_path / "c++").write_text("")
    (tmp_path / "c++").chmod(0o755)
    assert checks.compiler_check().fact == str(tmp_path / "c++")


# --- judging the machine


def test_a_quiet_machine():
    assert set(statuses(checks.cpu_checks(QUIET, LATER)).values()) == {OK}


def test_an_unreadable_machine_is_no_quiet_one():
    found = statuses(checks.cpu_checks(CpuFacts(), CpuFacts()))
    assert found.pop("cpu limit") == OK  # no cgroup is no limit
    assert set(found.values()) == {WARNING}


@pytest.mark.parametrize(
    "name, changes, status, words",
    [
        ("governor", {"governors": ("performance", "powersave")}, WARNING, "cpupower"),
        ("load", {"load_average_1_minute": 2.0}, OK, "2.00 on 8 cores"),
        ("load", {"load_average_1_minute": 2.1}, WARNING, "2.10 on 8 cores"),
        ("cpu limit", {"cgroup_cpus": 2.5}, WARNING, "OMP_NUM_THREADS=2"),
        ("cpu limit", {"cgroup_cpus": 0.5}, WARNING, "OMP_NUM_THREADS=1"),
        ("cpu limit", {"cgroup_cpus": 8.0}, OK, "8 CPUs"),
        ("memory", {"memory_available_bytes": 4 * GIB}, WARNING, "4.0 GiB"),
        ("memory", {"memory_available_bytes": GIB // 2}, CANNOT, "0.5 GiB"),
        ("swap", {"swap_used_bytes": GIB}, WARNING, "1.0 GiB in use"),
    ],
)
def test_what_is_wrong_with_a_machine(name, changes, status, words):
    found = checks.cpu_checks(replace(QUIET, **changes), LATER)
    check = the(name, found)
    assert check.status == status and words in str(check)
    assert {other: state for other, state in statuses(found).items() if other != name and state != OK} == {}


@pytest.mark.parametrize("stolen, status", [(10, OK), (11, WARNING)])
def test_steal_is_taken_between_the_two_looks(stolen, status):
    before = replace(QUIET, steal_jiffies=500)  # since boot: long ago
    check = the("steal", checks.cpu_checks(before, replace(LATER, steal_jiffies=500 + stolen)))
    assert check.status == status and f"{stolen / 1000:.1%}" in check.fact


@pytest.mark.parametrize("free, status", [(2 * GIB, OK), (GIB // 2, WARNING), (GIB // 32, CANNOT)])
def test_room_for_the_runs(monkeypatch, tmp_path, free, status):
    monkeypatch.setattr("perf.checks.shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    check = the("storage", checks.suite_checks(tmp_path / "not" / "made" / "yet"))
    assert check.status == status
    assert not (tmp_path / "not").exists()


def test_a_storage_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    check = the("storage", checks.suite_checks(tmp_path / "file" / "below"))
    assert check.status == CANNOT and "no folder that can be written to" in check.fact


@pytest.mark.parametrize("version, status", [("5.3.1", OK), ("4.0.0", CANNOT), (None, CANNOT)])
def test_the_version_of_pytest_benchmark(monkeypatch, tmp_path, version, status):
    def answer(package):
        if version is None:
            raise metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr("perf.checks.metadata.version", answer)
    assert the("pytest-benchmark", checks.suite_checks(tmp_path)).status == status


def test_a_slow_clock_and_no_git(monkeypatch, tmp_path):
    ticks = iter(range(10_000))
    monkeypatch.setattr("perf.checks.time.perf_counter", lambda: next(ticks) // 100 * 0.01)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = checks.suite_checks(tmp_path)
    assert the("clock", found).status == WARNING and "steps of 10000000 ns" in the("clock", found).fact
    assert the("git", found).status == WARNING


# --- the command


@pytest.fixture
def command(monkeypatch, fake_torch, tmp_path):
    """Run the doctor on a quiet machine, with a torch and a library of NVML that the test chooses."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    facts = iter([QUIET, LATER])
    monkeypatch.setattr("perf.doctor.cpu_facts", lambda: next(facts))

    def run(library: FakeNvml, *arguments: str, torch: str = "") -> int:
        fake_torch(torch)
        monkeypatch.setitem(sys.modules, "pynvml", library)
        parser = argparse.ArgumentParser()
        doctor.add_arguments(parser)
        return doctor.run(parser.parse_args([*arguments, "--storage", str(tmp_path / "runs")]))

    return run


def test_a_fit_machine_line_by_line(command, capsys):
    library = FakeNvml()
    assert command(library, "--device", "cuda:0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in (OK, WARNING) for line in lines[:-1])
    assert lines[-1].startswith("fit to measure (")
    assert any(line.startswith("ok       architecture      compute capability 9.0") for line in lines)
    assert any(line.startswith("ok       torch.compile     a small function in 0.0 s") for line in lines)
    assert library.users == 0


def test_a_machine_that_is_not_fit_says_so_and_exits_1(command, capsys):
    assert command(FakeNvml({"ComputeRunningProcesses_v3": [4242]}), "--no-compile") == 1
    out = capsys.readouterr().out
    assert "cannot   processes         the GPU is in use by pid 4242; every round" in out
    assert out.splitlines()[-1].startswith("not fit to measure: processes (")
    assert "torch.compile" not in out


def test_json(command, capsys):
    assert command(FakeNvml({"CurrentClocksEventReasons": 0x20}), "--json", "--no-compile") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == 1 and report["fit"] is False
    found = {check["name"]: check for check in report["checks"]}
    assert found["throttling"]["status"] == CANNOT and found["throttling"]["fact"] == "sw_thermal_slowdown"
    assert set(found["gpu"]) == {"name", "status", "fact", "advice"}


def test_a_cpu_is_examined_without_a_look_at_gpus(command, capsys):
    assert command(FakeNvml({"ComputeRunningProcesses_v3": [4242]}), "--device", "cpu", "--json", "--no-compile") == 0
    assert not {"gpu", "processes", "cuda", "triton"} & {
        check["name"] for check in json.loads(capsys.readouterr().out)["checks"]
    }


def test_a_missing_driver_ends_the_look_at_a_gpu_that_torch_sees(command, capsys):
    assert command(FakeNvml(init_error=LIBRARY_NOT_FOUND), "--no-compile") == 0
    assert "NVIDIA H200, unseen by NVML: no NVIDIA driver answers" in capsys.readouterr().out


@pytest.mark.parametrize("device, code", [("auto", 0), ("cuda", 1)])
def test_without_any_gpu_only_who_asks_for_one_is_refused(command, device, code):
    no_gpu = "cuda.is_available = lambda: False"
    assert command(FakeNvml(init_error=LIBRARY_NOT_FOUND), "--device", device, "--no-compile", torch=no_gpu) == code


def test_it_changes_nothing(command, monkeypatch, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    command(FakeNvml())
    assert list(scratch.iterdir()) == [] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", ""])
def test_a_device_that_is_none_is_a_usage_error(command, text):
    with pytest.raises(SystemExit) as exit_:
        command(FakeNvml(), "--device", text)
    assert exit_.value.code == 2


def test_this_machine_has_facts():
    """On whatever machine: the doctor's own looks at it give lines, and only known words."""
    cpu = doctor.cpu_facts()
    for check in [*checks.cpu_checks(cpu, cpu), *checks.suite_checks(Path(os.curdir)), checks.compiler_check()]:
        assert check.status in (OK, WARNING, CANNOT) and check.fact and "\n" not in str(check)
