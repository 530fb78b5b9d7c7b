"""The command doctor, with a fake torch and a fake NVML."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fake_machine import LATER, QUIET, fake_torch_fixture  # noqa: F401
from fake_nvml import LIBRARY_NOT_FOUND, FakeNvml

from perf.commands import checks, doctor
from perf.commands.checks import BUSY, CANNOT, OK, WARNING


@pytest.fixture
def command(monkeypatch, fake_torch, tmp_path):
    """Run the doctor on a quiet machine with a given torch and NVML library."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    facts = iter([QUIET, LATER])
    monkeypatch.setattr("perf.commands.doctor.cpu_facts", lambda: next(facts))

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


@pytest.mark.parametrize("load, cores", [(5.9, 2), (2.0, 2)])
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_busy_machine_is_not_called_fit(command, monkeypatch, capsys, load, cores, options):
    busy = iter([replace(facts, load_average_1_minute=load, cores=cores) for facts in (QUIET, LATER)])
    monkeypatch.setattr("perf.commands.doctor.cpu_facts", lambda: next(busy))
    assert command(FakeNvml(), "--device", "cpu", "--no-compile", *options) == 0
    out = capsys.readouterr().out
    if options:
        assert (json.loads(out)["fit"], json.loads(out)["busy"]) == (False, True)
        return
    assert f"busy     load              {load:.2f} on {cores} cores in the last minute; end other processes" in out
    assert "fit to measure" not in out and "busy: it can measure, but small differences will not be visible (" in out


def test_unfit_machine_exits_1(command, capsys):
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


def test_device_cpu_skips_gpu_checks(command, capsys):
    assert command(FakeNvml({"ComputeRunningProcesses_v3": [4242]}), "--device", "cpu", "--json", "--no-compile") == 0
    assert not {"gpu", "processes", "cuda", "triton"} & {
        check["name"] for check in json.loads(capsys.readouterr().out)["checks"]
    }


def test_missing_nvml_with_a_gpu_in_torch(command, capsys):
    assert command(FakeNvml(init_error=LIBRARY_NOT_FOUND), "--no-compile") == 0
    assert "NVIDIA H200, unseen by NVML: the NVIDIA driver does not respond" in capsys.readouterr().out


@pytest.mark.parametrize("device, code", [("auto", 0), ("cuda", 1)])
def test_missing_gpu_fails_only_with_device_cuda(command, device, code):
    no_gpu = "cuda.is_available = lambda: False"
    assert command(FakeNvml(init_error=LIBRARY_NOT_FOUND), "--device", device, "--no-compile", torch=no_gpu) == code


def test_doctor_is_read_only(command, monkeypatch, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    command(FakeNvml())
    assert list(scratch.iterdir()) == [] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", ""])
def test_unknown_device_is_a_usage_error(command, text):
    with pytest.raises(SystemExit) as exit_:
        command(FakeNvml(), "--device", text)
    assert exit_.value.code == 2


def test_this_machine_has_facts():
    """On any machine, every check has a fact and a known status."""
    cpu = doctor.cpu_facts()
    for check in [*checks.cpu_checks(cpu, cpu), *checks.suite_checks(Path(os.curdir)), checks.compiler_check()]:
        assert check.status in (OK, WARNING, BUSY, CANNOT) and check.fact and "\n" not in str(check)
