"""The torch probe subprocess: results, errors, crashes and hangs."""

from __future__ import annotations

import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from fake_machine import fake_torch_fixture, stand_in  # noqa: F401

from perf.commands import checks
from perf.commands.checks import CANNOT, OK, WARNING
from perf.commands.torch_probe import compile_trial, runs_on, stack_facts
from perf.machine.nvml import GpuFacts


def test_the_stack_of_an_interpreter(fake_torch):
    fake_torch("print('noise'); print('[1]'); print('{\"nonsense\": 1}'); print('{')")
    facts = stack_facts()
    assert facts.torch == "2.99.0+cu130" and facts.torch_imported and facts.error is None
    assert (facts.cuda, facts.cudnn, facts.device, facts.capability) == ("13.0", 91000, "NVIDIA H200", (9, 0))
    assert facts.arch_list == ("sm_80", "sm_90") and facts.uuid == "11111111-2222-3333-4444-555555555555"
    assert facts.python == ".".join(map(str, sys.version_info[:3]))


def test_installed_torch_is_reported(monkeypatch, tmp_path):
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
    assert check.status == CANNOT and "it was ended by signal 11" in check.fact


@pytest.mark.slow
def test_hanging_torch_is_killed_with_its_children(fake_torch, tmp_path):
    fake_torch(
        "child = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    facts = stack_facts(timeout_seconds=2)
    assert facts.error == "no answer within 2 s" and not facts.torch_imported
    child = int((tmp_path / "child").read_text())
    end = time.monotonic() + 10  # a killed process ends when it is next scheduled
    while _lives(child):
        assert time.monotonic() < end, f"process {child} is still alive"


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"  # zombie or dead
    except OSError:
        return False


def test_modules_of_the_working_directory_are_not_imported(fake_torch, monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/json.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path / "here")
    fake_torch()
    assert stack_facts().error is None


def test_missing_interpreter():
    facts = stack_facts("/nowhere/python")
    (check,) = checks.stack_checks(facts, GpuFacts())
    assert check.status == CANNOT and "/nowhere/python cannot be run" in check.fact


@pytest.mark.parametrize(
    "lines, error",
    [
        ("", None),
        ("def compile(function): return function", "torch.compile did not compile the function"),
        ("def compile(function): raise RuntimeError('no\\ncompiler')", "RuntimeError: no compiler"),
        ("allclose = lambda a, b, atol: False", "the compiled function returns different values"),
        ("del compile", "torch 2.99.0+cu130 has no torch.compile"),
    ],
)
def test_compile_trial(fake_torch, lines, error):
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
def test_builds_and_compute_capabilities(capability, arch_list, fits):
    assert runs_on(capability, arch_list) is fits
