"""`sd-perf submit`: refusals, the local executor, and a real Slurm of one node with a GPU that is none."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import one_node_slurm
import pytest

from perf.__main__ import main
from perf.analysis.verdicts import ExitCode
from perf.commands.submit import TASK, tasks_of
from perf.launch.process import ROOT

SCRIPT = """\
[ "$SLURM_ARRAY_TASK_ID" -lt 3 ] || { echo "no index from 0 to 2" >&2; exit 4; }
if [ -n "${SD_PERF_DRY_RUN:-}" ]; then echo "measure $SLURM_ARRAY_TASK_ID $*"; exit; fi
touch "$SD_PERF_OUT/busy-$SLURM_ARRAY_TASK_ID"
sleep 0.2
busy=$(find "$SD_PERF_OUT" -name 'busy-*' | wc -l)
echo "$busy ${CUDA_VISIBLE_DEVICES-none} $SD_PERF_DEVICE $*" > "$SD_PERF_OUT/$SLURM_ARRAY_TASK_ID.txt"
rm "$SD_PERF_OUT/busy-$SLURM_ARRAY_TASK_ID"
[ "$SLURM_ARRAY_TASK_ID" != 2 ]
"""
needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="the extra `slurm` is not installed"
)


@pytest.fixture
def script(tmp_path) -> Path:
    """Three tasks, each of which writes how many run at the same time; the last fails."""
    (tmp_path / "fleet").mkdir()
    path = tmp_path / "task.sh"
    path.write_text(SCRIPT)
    return path


def submit(script: Path, *arguments: str, environment=os.environ) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "perf", "submit", "--task", str(script), "--output", str(script.parent / "fleet")]
    return subprocess.run(
        [*command, *arguments],
        env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_measured(done: subprocess.CompletedProcess, script: Path, gpu: str, device: str) -> None:
    """Every task ran once, alone, and the third failed by name."""
    assert done.returncode == ExitCode.FAILED, done
    assert [line.partition(": ")[2] for line in done.stdout.splitlines()[:3]] == [
        f"measure {i} -k a b" for i in range(3)
    ]
    written = [(script.parent / "fleet" / f"{i}.txt").read_text() for i in range(3)]
    assert written == [f"1 {gpu} {device} -k a b\n"] * 3
    assert f"failed: RuntimeError: task 2 of {script} ended with status 1; see " in done.stderr
    assert done.stderr.count("failed: ") == 1


@pytest.mark.slow
@needs_submitit
def test_tasks_run_one_after_the_other_on_this_machine(script):
    done = submit(script, "--cluster", "local", "--device", "cpu", "--", "-k", "a b")
    assert_measured(done, script, gpu="", device="cpu")


@pytest.mark.slow
@needs_submitit
@pytest.mark.skipif(one_node_slurm.why_unavailable() is not None, reason=str(one_node_slurm.why_unavailable()))
def test_a_real_slurm_gives_each_task_the_gpu(script, tmp_path):
    """Tasks of an array share one node with one GPU: they run one after the other, each with that GPU."""
    (tmp_path / "slurm").mkdir()
    with one_node_slurm.one_node_slurm(tmp_path / "slurm") as environment:
        resources = ("--gres", "gpu:fake:1", "--cpus", "1", "--memory", "0.1", "--minutes", "2")
        done = submit(script, *resources, "--wait", "--", "-k", "a b", environment=environment)
    assert_measured(done, script, gpu="0", device="cuda")


def test_the_matrix_of_docs_is_submitted():
    """The commands of all lines of docs/fleet/task.sh, in their order."""
    tasks, commands = tasks_of(ROOT / TASK, "cpu", Path("/out"), ("--collect-only",))
    assert [task.index for task in tasks] == list(range(len(commands))) and len(commands) > 3
    words = shlex.split(commands[0])
    assert words[1:6] == ["-m", "pytest", "perf", "-m", "published"]
    assert words[-1] == "--collect-only" and "cpu" in words


@needs_submitit
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "missing.sh"], "--task missing.sh: no such file"),
        ([], "docs/fleet/task.sh: no such file"),
        (["--task", "broken.sh"], "broken.sh: unknown GPU"),
        (["--task", "endless.sh"], "endless.sh: has more than 3 tasks; it must exit with 4 after its last one"),
        (["--task", "good.sh"], 'Could not detect "srun"'),
    ],
)
def test_refusals(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("programs").mkdir()
    Path("programs/bash").symlink_to(shutil.which("bash"))
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))  # without Slurm
    Path("broken.sh").write_text("echo unknown GPU >&2; exit 1\n")
    Path("good.sh").write_text(SCRIPT)
    Path("endless.sh").write_text("exit 0\n")
    monkeypatch.setattr("perf.commands.submit.MOST_TASKS", 3)
    assert main(["submit", *arguments]) == ExitCode.REFUSED
    assert message in capsys.readouterr().err


def test_without_submitit_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(["submit"]) == ExitCode.REFUSED
    assert "pip install 'sd-perf[slurm]'" in capsys.readouterr().err
