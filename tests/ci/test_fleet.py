"""The templates of docs/fleet: what their index picks, and that each asks for one GPU. As far as a dry run goes."""

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
    kept = {name: value for name, value in os.environ.items() if name not in INDEX.values()}
    return subprocess.run(
        ["bash", str(FLEET / script), *arguments],
        cwd=cwd,
        env={**kept, "SLURM_SUBMIT_DIR": str(ROOT), "HOSTNAME": "node7", **variables},
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
def test_the_index_picks_the_line(script, index, tmp_path):
    done = start(script, SD_PERF_DRY_RUN="1", SD_PERF_OUT=str(tmp_path / "a b"), **{INDEX[script]: str(index)})
    assert done.returncode == 0, done
    words = shlex.split(done.stdout)
    assert words[:4] == [".venv/bin/python", "-m", "pytest", "perf"]
    wanted = MATRIX[index].split()
    assert words[4 : 4 + len(wanted)] == wanted
    assert words[4 + len(wanted) : -1] == [
        *("--device", "cuda", "--benchmark-storage"),
        f"file://{tmp_path}/a b/node7-{index}",
    ]
    assert words[-1] == "--benchmark-autosave"
    assert not list(tmp_path.iterdir())


def test_a_line_is_measured_once():
    assert len(set(MATRIX)) == len(MATRIX) > 3


@pytest.mark.parametrize("index", [None, "", "-1", str(len(MATRIX)), "x", "0; touch harmed"])
def test_an_index_that_there_is_not_is_refused(index, tmp_path):
    done = start("task.sh", cwd=tmp_path, SD_PERF_DRY_RUN="1", **({} if index is None else {INDEX["task.sh"]: index}))
    assert done.returncode == 4 and f"no index from 0 to {len(MATRIX) - 1}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_machine_that_cannot_measure_ends_before_it_measures(tmp_path):
    """With a Python that says so: nothing else is started, and the exit status is its own."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n[ "$3" != doctor ]\n')
    python.chmod(0o755)
    done = start("task.sh", SD_PERF_PYTHON=str(python), SD_PERF_OUT=str(tmp_path / "out"), JOB_COMPLETION_INDEX="0")
    assert (done.returncode, done.stdout) == (1, "-m perf doctor --device cuda --no-compile\n")


@pytest.mark.slow
def test_what_a_task_would_measure(tmp_path):
    """The real pytest, which collects and does not measure."""
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


def test_slurm_asks_for_one_gpu_a_line():
    text = (FLEET / "slurm.sh").read_text(encoding="utf-8")
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    assert asked["array"] == f"0-{len(MATRIX) - 1}" and asked["gres"] == "gpu:1"
    assert {"cpus-per-task", "mem", "time", "output"} <= set(asked)
    before_commands = text.partition("set -euo")[0]
    assert before_commands.count("#SBATCH") == text.count("#SBATCH") == len(asked), "Slurm reads none behind a command"


def test_kubernetes_asks_for_one_gpu_an_index():
    job = yaml.safe_load((FLEET / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == len(MATRIX) >= spec["parallelism"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "what Jobs with backoffLimitPerIndex must have"
    assert pod["automountServiceAccountToken"] is False and pod["securityContext"]["runAsNonRoot"] is True
    (container,) = pod["containers"]
    assert container["command"] == ["bash", "docs/fleet/task.sh"] and (ROOT / container["command"][1]).is_file()
    resources = container["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == "1" and resources["limits"] == resources["requests"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    given = {one["name"]: one["value"] for one in container["env"]}
    mounts, volumes = container["volumeMounts"], {one["name"] for one in pod["volumes"]}
    assert {mount["name"] for mount in mounts} == volumes and given["SD_PERF_OUT"] in {
        one["mountPath"] for one in mounts
    }
    assert not any("secret" in str(value).lower() for value in (given, pod["volumes"]))
