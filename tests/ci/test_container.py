"""The Dockerfile, where no daemon can build it: its commands with fake programs; the devcontainer, pre-commit, the notebook."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from documents import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
FAKES = ("apt-get", "pip", "useradd", "uv", "chown", "rm")


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, with continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()]


def test_every_instruction_is_known_and_the_user_is_not_root():
    names = [name for name, _ in instructions()]
    assert set(names) <= {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "CMD"}
    assert names.count("FROM") == 1 and names[-3:] == ["USER", "ENV", "CMD"]
    assert dict(instructions())["USER"] == "1000"
    assert json.loads(dict(instructions())["CMD"])[:2] == ["pytest", "perf"]
    assert ".git" in (ROOT / ".dockerignore").read_text().splitlines()


@pytest.mark.parametrize(
    "device, installed",
    [
        ("cuda", "uv pip install --system --no-cache -c constraints/torch215.txt -e .[test,report,gpu]"),
        ("cpu", "uv pip install --system --no-cache --torch-backend=cpu -c constraints/torch215.txt -e .[test,report]"),
        ("tpu", None),
    ],
)
def test_commands_for_a_device(tmp_path, device, installed):
    for name in FAKES:
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/log\n')
        (tmp_path / name).chmod(0o755)
    arguments = dict(text.split("=") for name, text in instructions() if name == "ARG")
    script = "\n".join(text for name, text in instructions() if name == "RUN")
    variables = {**arguments, "DEVICE": device, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["sh", "-e", "-c", script], env=variables, cwd=ROOT, capture_output=True, text=True)
    log = (tmp_path / "log").read_text()
    assert "apt-get install --yes --no-install-recommends g++ git" in log
    if installed is None:
        assert (
            done.returncode == 4
            and "DEVICE is cuda or cpu" in done.stderr
            and "uv" not in log.split("pip install")[-1][:3]
        )
        return
    assert done.returncode == 0, done.stderr
    assert installed in log
    assert (ROOT / "constraints" / f"{arguments['TORCH']}.txt").is_file()


def test_versions_are_those_of_the_other_files():
    (version,) = re.findall(r"uv==([\d.]+)", DOCKERFILE)
    assert f"uv=={version}" in (ROOT / ".github" / "scripts" / "install").read_text()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert f"ruff=={hooks['repos'][0]['rev'][1:]}" in (ROOT / "pyproject.toml").read_text()


def test_devcontainer_builds_the_dockerfile():
    folder = ROOT / ".devcontainer"
    content = json.loads((folder / "devcontainer.json").read_text())
    build, names = content["build"], [text.split("=")[0] for name, text in instructions() if name == "ARG"]
    assert (folder / build["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert set(build["args"]) <= set(names)
    assert f"--uid 1000 {content['remoteUser']}" in DOCKERFILE
    assert content["workspaceFolder"] == dict(instructions())["WORKDIR"]


@pytest.mark.nightly
@pytest.mark.report
def test_notebook_runs(tmp_path):
    """All cells in order, in a process of its own and an empty folder."""
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and all(not cell.get("outputs") for cell in notebook["cells"])
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    done = subprocess.run(
        [sys.executable, "-c", "\n\n".join(cells)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"tiny-sdpa-plms4-b1 \[.+\] right", done.stdout), done.stdout
