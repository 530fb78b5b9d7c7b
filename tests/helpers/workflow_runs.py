"""Run the scripts of .github/scripts as Actions does, on a fake machine: programs, events, runs and outcomes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import outcomes
import saved_runs

from perf.runs.storage import storage_name

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / ".github" / "scripts"
EVENTS = ROOT / "tests" / "ci" / "events"
REVIEWED = "0123456789abcdef0123456789abcdef01234567"
MAIN = "a" * 40
GPU = "NVIDIA H200, GPU-11111111-2222-3333-4444-555555555555, 580.95.05, Enabled, 34, 1980, 700.00"
# Variables that select numeric kernels and the location of packages.
PASSED_ON = ("OPENBLAS_", "OMP_", "MKL_", "LD_LIBRARY_PATH", "PYTHONPATH")
PROGRAMS = {
    "nvidia-smi": """#!/bin/sh
echo "nvidia-smi $*" >>"$FAKE_LOG"
case "$*" in
*--query-gpu=*) printf '%s\\n' "$FAKE_GPU" ;;
*--query-compute-apps=*) printf '%s' "$FAKE_PROCESSES" ;;
*) [ -z "$FAKE_DENIED" ] || { echo "Insufficient Permissions" >&2; exit 4; } ;;
esac
""",
    "gh": """#!/bin/sh
echo "gh $*" >>"$FAKE_LOG"
case "$*" in
*/permission*) printf '%s\\n' "$FAKE_PERMISSION" ;;
*/commits*) printf '%s\\n' "$FAKE_COMMITS" ;;
*--paginate*/comments*) printf '%s\\n' "$FAKE_COMMENT"; exit "${FAKE_STATUS:-0}" ;;
*)
    for argument; do case "$argument" in body=@*) cat "${argument#body=@}" >"$FAKE_LOG.body" ;; esac; done
    exit "${FAKE_STATUS:-0}"
    ;;
esac
""",
}


@dataclass
class Runner:
    """A fake machine. path: its folder. environment: variables beside those that Actions sets."""

    path: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        programs = self.path / "bin"
        programs.mkdir()
        for name, text in PROGRAMS.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (self.path / "temp").mkdir()
        (self.path / "root" / "run").mkdir(parents=True)
        (self.path / "root" / "run" / ".containerenv").touch()
        (self.path / "log").touch()
        self.environment = {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.path),
            "TMPDIR": str(self.path),  # for the locks of devices
            **{name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)},
            "FAKE_LOG": str(self.path / "log"),
            "FAKE_GPU": GPU,
            "FAKE_PERMISSION": "write",
            "FAKE_COMMENT": "",
            "FAKE_COMMITS": REVIEWED,
            "RUNNER_TEMP": str(self.path / "temp"),
            "GITHUB_OUTPUT": str(self.path / "output"),
            "GITHUB_STEP_SUMMARY": str(self.path / "summary"),
            "GITHUB_WORKSPACE": str(self.path),
            "GITHUB_REPOSITORY": "octo-org/sd-perf",
            "GITHUB_SHA": MAIN,
            "GITHUB_REF": "refs/heads/main",
            "LABEL": "h200",
            **self.environment,
        }

    def run(self, script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess:
        """Run one step of a job in this folder."""
        return subprocess.run(
            [sys.executable, str(SCRIPTS / script), *arguments],
            cwd=self.path,
            env={**self.environment, **more},
            capture_output=True,
            text=True,
            timeout=600,
        )

    def on_event(self, file: str, name: str, **more: str) -> subprocess.CompletedProcess:
        """Run the first job of perf.yml on an event of tests/ci/events."""
        path = str(EVENTS / f"{file}.json")
        return self.run("resolve.py", "perf", GITHUB_EVENT_PATH=path, GITHUB_EVENT_NAME=name, **more)

    @property
    def outputs(self) -> dict[str, str]:
        """Outputs of the steps so far; the last value of a name counts, as in Actions."""
        path = self.path / "output"
        lines = path.read_text().splitlines() if path.exists() else []
        return dict(line.partition("=")[::2] for line in lines)

    @property
    def out(self) -> Path:
        """The folder that the job uploads."""
        return self.path / "temp" / "perf" / "h200"

    @property
    def summary(self) -> str:
        """The summary page of the job."""
        path = self.path / "summary"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    @property
    def posted(self) -> str:
        """The text of the last comment."""
        return (self.path / "log.body").read_text(encoding="utf-8")

    @property
    def log(self) -> list[str]:
        """The command lines of the fake programs."""
        return (self.path / "log").read_text().splitlines()


def session(number: int = 1, slow: dict[str, float] | None = None, noise: float = 0.002) -> dict:
    """The golden run without its invalid round, as session `number`: a candidate for a baseline."""
    made = saved_runs.document(number, slow, noise=noise)
    made["perf"].update(invalid_rounds=0, aa=None)
    for benchmark in made["benchmarks"]:
        benchmark["extra_info"]["verdict"] = None
        launches = benchmark["extra_info"]["launches"]
        for launch in launches:
            launch["invalid"] = {}
        benchmark["stats"]["data"] = [seconds for launch in launches for seconds in launch["round_seconds"]]
    return made


def judged(made: dict, verdict: str, reason: str = "beyond_margin", estimate: float = 1.05) -> dict:
    """The same run with a verdict for every configuration."""
    made = copy.deepcopy(made)
    ratio = {"estimate": estimate, "low": estimate - 0.01, "high": estimate + 0.01}
    for benchmark in made["benchmarks"]:
        benchmark["extra_info"]["verdict"] = {
            "verdict": verdict,
            "reason": reason,
            "ratio": ratio,
            "margin": 0.01,
            "against": "0008_main",
        }
    if verdict == "SLOWER":
        made["perf"]["regressed"] = [benchmark["extra_info"]["configuration"]["id"] for benchmark in made["benchmarks"]]
    return made


def stored(folder: Path, count: int = 8, label: str = "h200", series: str = "published") -> list[Path]:
    """Store `count` sessions of an unchanged tree as baselines of a machine."""
    target = folder / label / series / storage_name(saved_runs.STACK)
    target.mkdir(parents=True, exist_ok=True)
    return [
        saved_runs.store(target, session(number), number, f"{number:012x}_00000000") for number in range(1, count + 1)
    ]


def left(
    artifacts: Path,
    made: dict | None,
    label: str = "h200",
    series: str = "published",
    code: int = 0,
    sha: str = MAIN,
    **more,
) -> Path:
    """Write the artifact of a machine: its outcome, and its run if it has one. Returns the folder."""
    folder = artifacts / label / series
    outcomes.Outcome(label, series, sha, code, has_run=made is not None, **more).write(folder)
    if made is not None:
        (folder / outcomes.RUN).write_text(json.dumps(made), encoding="utf-8")
    return folder
