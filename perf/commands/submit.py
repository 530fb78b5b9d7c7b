"""`sd-perf submit`: send the tasks of docs/fleet/task.sh to Slurm, or to processes of this machine, through submitit."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.analysis.verdicts import ExitCode

TASK = Path("docs/fleet/task.sh")
NO_SUCH_INDEX = ExitCode.REFUSED  # the exit status of task.sh beyond its last line
MOST_TASKS = 1000  # a script that ignores SD_PERF_DRY_RUN would measure here, one index after the other


@dataclass(frozen=True)
class Task:
    """One line of the matrix in a task script, as a function without arguments that submitit can pickle.

    arguments: passed on to pytest.
    """

    script: Path
    index: int
    device: str
    output: Path
    arguments: tuple[str, ...] = ()

    def run(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the script for this index; variables: further variables of its environment."""
        own = {
            "SLURM_ARRAY_TASK_ID": str(self.index),
            "SD_PERF_PYTHON": sys.executable,
            "SD_PERF_DEVICE": self.device,
            "SD_PERF_OUT": str(self.output),
        }
        stdout = subprocess.PIPE if variables else None
        command = ["bash", str(self.script), *self.arguments]
        return subprocess.run(
            command, env={**os.environ, **own, **variables}, stdout=stdout, stderr=stdout, text=True, check=False
        )

    def __call__(self) -> None:
        """Measure. Raises RuntimeError if the script fails, so that the job does."""
        status = self.run().returncode
        if status:
            raise RuntimeError(f"task {self.index} of {self.script} ended with status {status}")


def tasks_of(script: Path, device: str, output: Path, arguments: tuple[str, ...]) -> tuple[list[Task], list[str]]:
    """The tasks of a script, and the command of each. Raises ValueError for a script without tasks."""
    tasks, commands = [], []
    for index in range(MOST_TASKS + 1):
        task = Task(script, index, device, output, arguments)
        done = task.run(SD_PERF_DRY_RUN="1")
        if done.returncode == NO_SUCH_INDEX and tasks:
            return tasks, commands
        if done.returncode:
            raise ValueError(f"{script}: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
        tasks.append(task)
        commands.append(done.stdout.strip())
    raise ValueError(
        f"{script}: has more than {MOST_TASKS} tasks; it must exit with {NO_SUCH_INDEX} after its last one"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    add = parser.add_argument
    help = "slurm, or local: processes on this machine, one after the other, until all end (default: slurm)"
    add("--cluster", choices=("slurm", "local"), default="slurm", help=help)
    help = (
        "script with a task for each SLURM_ARRAY_TASK_ID, which prints its command under SD_PERF_DRY_RUN=1 and exits with "
        f"{int(NO_SUCH_INDEX)} beyond the last one (default: %(default)s)"
    )
    add("--task", type=Path, default=TASK, metavar="FILE", help=help)
    add(
        "--output", type=Path, default=Path("fleet"), metavar="DIR", help="folder of runs and logs, shared by all nodes"
    )
    add("--device", choices=("cuda", "cpu"), default="cuda", help="device of the tasks (default: cuda)")
    add("--gres", default="gpu:1", help="GPU of a task, as for sbatch, such as gpu:h100:1 (default: gpu:1)")
    add("--partition", help="partition of Slurm (default: the cluster's)")
    add("--cpus", type=int, default=8, metavar="N", help="cores of a task (default: 8)")
    add("--memory", type=float, default=32.0, metavar="GB", help="memory of a task (default: 32)")
    add("--minutes", type=int, default=120, metavar="N", help="time limit of a task (default: 120)")
    add("--wait", action="store_true", help="wait for the tasks; exit 1 if one fails")
    add("arguments", nargs="*", metavar="-- ARGUMENT", help="further arguments of pytest, after --")


def run(arguments: argparse.Namespace) -> int:
    """Submit; returns the exit status."""
    try:
        import submitit
    except ImportError:
        print("sd-perf submit needs submitit: pip install 'sd-perf[slurm]'", file=sys.stderr)
        return ExitCode.REFUSED
    output = arguments.output.absolute()
    script = arguments.task.absolute()
    if not script.is_file():
        print(f"--task {arguments.task}: no such file; run this in the repository, or name a script", file=sys.stderr)
        return ExitCode.REFUSED
    try:
        tasks, commands = tasks_of(script, arguments.device, output, tuple(arguments.arguments))
        executor = submitit.AutoExecutor(folder=output / "logs", cluster=arguments.cluster)
    except (ValueError, RuntimeError) as error:  # submitit: no Slurm on this machine
        print(" ".join(str(error).split()), file=sys.stderr)
        return ExitCode.REFUSED
    executor.update_parameters(name="sd-perf", timeout_min=arguments.minutes, cpus_per_task=arguments.cpus)
    executor.update_parameters(mem_gb=arguments.memory, slurm_gres=arguments.gres)
    if arguments.partition is not None:
        executor.update_parameters(slurm_partition=arguments.partition)
    if arguments.cluster == "local":  # one after the other: tasks at the same time would slow each other
        executor.update_parameters(gpus_per_node=int(arguments.device == "cuda"))
        failed = [_failure(_submitted(executor, task, command)) for task, command in zip(tasks, commands)]
        return ExitCode.FAILED if any(failed) else ExitCode.OK
    with executor.batch():  # one array job
        jobs = [executor.submit(task) for task in tasks]
    for job, command in zip(jobs, commands):
        print(f"{job.job_id}: {command}")
    print(f"logs in {output / 'logs'}; afterwards: sd-perf merge {arguments.output} --output all")
    failed = [_failure(job) for job in jobs] if arguments.wait else []
    return ExitCode.FAILED if any(failed) else ExitCode.OK


def _submitted(executor: Any, task: Task, command: str) -> Any:
    job = executor.submit(task)
    print(f"{job.job_id}: {command}", flush=True)
    return job


def _failure(job: Any) -> bool:
    """Wait for a job; print its error, and return whether it has one."""
    error = job.exception()
    if error is None:
        return False
    lines = str(error).strip().splitlines()  # submitit's, with a traceback
    reason = next((line for line in reversed(lines) if "Error: " in line), lines[0])
    print(f"{job.job_id} failed: {reason}; see {job.paths.stderr}", file=sys.stderr)
    return True
