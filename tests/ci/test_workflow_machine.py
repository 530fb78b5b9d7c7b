"""Tests of .github/scripts/gpu.py with a fake nvidia-smi: the checks of a machine, and the lock of its clock."""

from __future__ import annotations

import json

import pytest
from workflow_runs import GPU, Runner

from perf.analysis.verdicts import ExitCode


@pytest.fixture
def runner(tmp_path) -> Runner:
    return Runner(tmp_path)


def check(runner: Runner, **more: str):
    return runner.run("gpu.py", "check", str(runner.path / "root"), **more)


def test_the_promised_machine_passes_and_is_recorded(runner):
    done = check(runner)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "h200: NVIDIA H200, GPU-11111111" in done.stdout
    recorded = json.loads((runner.out / "gpu.json").read_text())
    assert (recorded["driver_version"], recorded["problems"]) == ("580.95.05", [])


@pytest.mark.parametrize(
    "wrong, right, message",
    [
        ("NVIDIA A10", "NVIDIA H200", "the GPU is NVIDIA A10, the label promises NVIDIA H200"),
        ("535.104.05", "580.95.05", "the driver is 535.104.05, the label promises 580.*"),
        ("Disabled", "Enabled", "persistence mode is off"),
        (" 71,", " 34,", "the GPU has 71 degrees"),
        (" 55,", " 34,", "the GPU has 55 degrees, it must have less than 55"),
        (" [N/A],", " 34,", "the temperature cannot be read"),
    ],
)
def test_machine_unlike_its_label_is_refused(runner, wrong, right, message):
    done = check(runner, FAKE_GPU=GPU.replace(right, wrong))
    assert done.returncode == ExitCode.REFUSED
    assert message in done.stdout
    assert message in " ".join(json.loads((runner.out / "gpu.json").read_text())["problems"])


def test_foreign_process_on_the_gpu_is_refused(runner):
    done = check(runner, FAKE_PROCESSES="4242, /usr/bin/miner\n")
    assert done.returncode == ExitCode.REFUSED
    assert "foreign process: 4242, /usr/bin/miner" in done.stdout


def test_several_gpus_are_refused_unless_one_is_selected(runner):
    done = check(runner, FAKE_GPU=f"{GPU}\n{GPU}")
    assert done.returncode == ExitCode.REFUSED
    assert "2 GPUs are visible: set CUDA_VISIBLE_DEVICES" in done.stdout
    assert check(runner, CUDA_VISIBLE_DEVICES="1").returncode == 0
    assert "nvidia-smi -i 1 --query-gpu=" in runner.log[-2]


def test_a_machine_without_a_gpu_is_refused(runner):
    (runner.path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
    done = check(runner)
    assert done.returncode == ExitCode.REFUSED
    assert "no devices were found" in done.stdout


def test_an_unknown_label_is_refused(runner):
    done = check(runner, LABEL="a100")
    assert done.returncode == ExitCode.REFUSED
    assert "the fleet has no machine 'a100'" in done.stdout


def test_writable_docker_socket_is_refused(runner):
    socket = runner.path / "root" / "var" / "run" / "docker.sock"
    socket.parent.mkdir(parents=True)
    socket.touch()
    done = check(runner)
    assert done.returncode == ExitCode.REFUSED
    assert "docker's socket" in done.stdout


def test_writable_models_are_refused(runner):
    done = check(runner, SD_PERF_MODELS=str(runner.path))
    assert done.returncode == ExitCode.REFUSED
    assert "mount the models read-only" in done.stdout


def test_root_is_accepted_only_in_a_container(tmp_path):
    import gpu

    assert gpu.runner_problems(tmp_path, 1000) == []
    assert gpu.runner_problems(tmp_path, 0) == ["the runner is root outside a container: give it a user of its own"]
    (tmp_path / ".dockerenv").touch()
    assert gpu.runner_problems(tmp_path, 0) == []


def test_gpu_with_another_uuid_is_refused():
    import gpu
    from workflow import Machine

    facts = {**dict(zip(gpu.QUERY, GPU.split(", "))), "processes": []}
    promised = Machine("NVIDIA H200", "580.", (facts["uuid"],))
    assert gpu.problems(facts, promised) == []
    assert gpu.problems({**facts, "uuid": "GPU-0"}, promised) == ["GPU-0 is none of this label's GPUs"]


def test_clock_is_locked_and_unlocked(runner):
    assert runner.run("gpu.py", "lock").returncode == 0
    assert json.loads((runner.out / "clocks.json").read_text())["locked_mhz"] == 1500
    assert runner.run("gpu.py", "unlock").returncode == 0
    assert runner.log == ["nvidia-smi -lgc 1500,1500", "nvidia-smi -rgc"]


def test_denied_lock_is_recorded_and_not_undone(runner):
    done = runner.run("gpu.py", "lock", FAKE_DENIED="yes")
    assert done.returncode == 0
    recorded = json.loads((runner.out / "clocks.json").read_text())
    assert recorded["locked_mhz"] is None
    assert "Insufficient Permissions" in recorded["reason"]
    assert runner.run("gpu.py", "unlock").returncode == 0
    assert len(runner.log) == 1


def test_denied_unlock_is_an_error(runner):
    assert runner.run("gpu.py", "lock").returncode == 0
    assert runner.run("gpu.py", "unlock", FAKE_DENIED="yes").returncode == ExitCode.REFUSED


def test_unlock_without_a_lock_does_nothing(runner):
    assert runner.run("gpu.py", "unlock").returncode == 0
    assert runner.log == []


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"h200": {"gpu": "X", "driver": "1", "temperature_limit": 9}}', "has other fields"),
        ('{"h200": {"gpu": "X"}}', "names no gpu or no driver"),
        ('{"../up": {"gpu": "X", "driver": "1"}}', "is no label"),
        ("{}", "the fleet is empty"),
        ("[]", "is not an object"),
        ("{", "cannot be read"),
    ],
)
def test_invalid_fleet_file_is_refused(tmp_path, text, message):
    import workflow

    path = tmp_path / "fleet.json"
    path.write_text(text)
    with pytest.raises(workflow.Refusal, match=message):
        workflow.fleet(path)
