"""Tests of the templates in docs/fleet by dry runs: the task index, and one GPU per task."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FLEET = ROOT / "docs" / "fleet"
MATRIX = re.findall(r'^    "(-.+)"$', (FLEET / "task.sh").read_text(encoding="utf-8"), re.MULTILINE)
INDEX = {"slurm.sh": "SLURM_ARRAY_TASK_ID", "task.sh": "JOB_COMPLETION_INDEX"}


def start(script: str, *arguments: str, cwd=ROOT, **variables: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name not in INDEX.values()}
    return subprocess.run(
        ["bash", str(FLEET / script), *arguments],
        cwd=cwd,
        env={**inherited, "SLURM_SUBMIT_DIR": str(ROOT), "HOSTNAME": "node7", **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("script", INDEX)
def test_scripts_are_well_formed(script):
    assert subprocess.run(["bash", "-n", str(FLEET / script)], capture_output=True).stderr == b""
    assert os.access(FLEET / script, os.X_OK)


@pytest.mark.parametrize("script", INDEX)
@pytest.mark.parametrize("index", range(len(MATRIX)))
def test_index_selects_the_line(script, index, tmp_path):
    done = start(script, SD_PERF_DRY_RUN="1", SD_PERF_OUT=str(tmp_path / "a b"), **{INDEX[script]: str(index)})
    assert done.returncode == 0, done
    words = shlex.split(done.stdout)
    assert words[:4] == [".venv/bin/python", "-m", "pytest", "perf"]
    expected = MATRIX[index].split()
    assert words[4 : 4 + len(expected)] == expected
    assert words[4 + len(expected) : -1] == [
        *("--device", "cuda", "--benchmark-storage"),
        f"file://{tmp_path}/a b/node7-{index}",
    ]
    assert words[-1] == "--benchmark-autosave"
    assert not list(tmp_path.iterdir())


def test_lines_are_unique():
    assert len(set(MATRIX)) == len(MATRIX) > 3


@pytest.mark.parametrize("index", [None, "", "-1", str(len(MATRIX)), "x", "0; touch harmed"])
def test_invalid_index_is_refused(index, tmp_path):
    done = start("task.sh", cwd=tmp_path, SD_PERF_DRY_RUN="1", **({} if index is None else {INDEX["task.sh"]: index}))
    assert done.returncode == 4 and f"no index from 0 to {len(MATRIX) - 1}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_unfit_machine_ends_before_measuring(tmp_path):
    """A fake Python fails the doctor: nothing else starts, and its exit status is returned."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n[ "$3" != doctor ]\n')
    python.chmod(0o755)
    done = start("task.sh", SD_PERF_PYTHON=str(python), SD_PERF_OUT=str(tmp_path / "out"), JOB_COMPLETION_INDEX="0")
    assert (done.returncode, done.stdout) == (1, "-m perf doctor --device cuda --no-compile\n")


@pytest.mark.slow
def test_task_collects_its_configurations(tmp_path):
    """Run pytest with --collect-only."""
    done = start(
        "slurm.sh",
        *("--collect-only", "-q", "-p", "no:cacheprovider"),
        SD_PERF_PYTHON=sys.executable,
        SD_PERF_DEVICE="cpu",
        SD_PERF_OUT=str(tmp_path),
        SLURM_ARRAY_TASK_ID="1",
        PYTHONPATH=str(ROOT),
    )
    assert done.returncode == 0, done
    ids = re.findall(r"test_txt2img\[(.+)\]", done.stdout)
    assert len(ids) == 5 and all(id.startswith("sd2-") and id.endswith("-b2") for id in ids), done.stdout


def test_slurm_task_opens_its_log_in_a_folder_that_it_creates(tmp_path):
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    numbers = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "2"}
    done = start("slurm.sh", SLURM_SUBMIT_DIR=str(tmp_path), SD_PERF_DRY_RUN="1", **numbers)
    assert (done.returncode, done.stdout) == (0, "")
    assert "-m pytest perf" in (tmp_path / "fleet" / "77_2.log").read_text()
    done = start("slurm.sh", SLURM_SUBMIT_DIR=str(tmp_path), **{**numbers, "SLURM_ARRAY_TASK_ID": "99"})
    assert done.returncode == 4 and "no index from 0" in (tmp_path / "fleet" / "77_99.log").read_text()


@pytest.mark.parametrize(
    "answers, seconds, expected",
    [
        (["", "Complete"], "60", 0),
        (["", "FailureTarget Failed"], "60", 1),
        (["SuccessCriteriaMet Complete"], "60", 0),
        ([""] * 9, "0", 124),
        (["error"], "60", 3),
    ],
)
def test_waiting_for_a_kubernetes_job_ends_with_it(tmp_path, answers, seconds, expected):
    """A fake kubectl gives one answer per call, the last one for ever."""
    for number, answer in enumerate(answers):
        (tmp_path / f"{number:02d}").write_text(answer)
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        f'#!/bin/sh\ncd {tmp_path}; set -- $(ls [0-9]*); answer=$(cat "$1"); [ $# -gt 1 ] && rm "$1"\n'
        '[ "$answer" != error ] || exit 3\necho "$answer"\n'
    )
    kubectl.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", str(FLEET / "wait.sh"), "sd-perf", seconds],
        env={**os.environ, "PATH": path, "SD_PERF_POLL_SECONDS": "0.6" if seconds == "0" else "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == expected, done
    assert expected == 0 or expected == 3 or "wait.sh: sd-perf" in done.stderr


def test_slurm_requests_one_gpu_per_line():
    text = (FLEET / "slurm.sh").read_text(encoding="utf-8")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    assert options["array"] == f"0-{len(MATRIX) - 1}" and options["gres"] == "gpu:1"
    assert {"cpus-per-task", "mem", "time", "output"} <= set(options)
    before_commands = text.partition("set -euo")[0]
    assert before_commands.count("#SBATCH") == text.count("#SBATCH") == len(options), (
        "Slurm ignores options after a command"
    )


def test_kubernetes_requests_one_gpu_per_index():
    job = yaml.safe_load((FLEET / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == len(MATRIX) >= spec["parallelism"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "required with backoffLimitPerIndex"
    assert pod["automountServiceAccountToken"] is False and pod["securityContext"]["runAsNonRoot"] is True
    (container,) = pod["containers"]
    assert container["command"] == ["bash", "docs/fleet/task.sh"] and (ROOT / container["command"][1]).is_file()
    resources = container["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == "1" and resources["limits"] == resources["requests"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    installs_for_the_system = "uv pip install --system" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert installs_for_the_system and variables["SD_PERF_PYTHON"] == "python"
    mounts, volumes = container["volumeMounts"], {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in mounts} == volumes and variables["SD_PERF_OUT"] in {
        mount["mountPath"] for mount in mounts
    }
    assert not any("secret" in str(value).lower() for value in (variables, pod["volumes"]))
