"""Tests of .github/scripts/action.py, the step of the composite action: inputs, pytest's options, outputs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path

import action
import pytest
from workflow import Refusal
from workflow_runs import MAIN, ROOT, judged, session

from perf.analysis.verdicts import ExitCode

INPUTS = (
    "SET",
    "MODEL",
    "CKPT",
    "CKPT_SHA256",
    "CONFIG",
    "ENGINE",
    "ATTENTION",
    "STEPS",
    "BATCH",
    "COMPARE",
    "ARGUMENTS",
)
INPUTS += ("STORAGE", "REPORT")


UNMEASURED = {"verdict": "could not measure", "run": "", "report": ""}


@pytest.fixture
def step(tmp_path, monkeypatch):
    return Step(tmp_path, monkeypatch)


class Step:
    """The step in another repository's workflow, with a fake pytest that writes `document` and exits with `code`."""

    def __init__(self, path: Path, monkeypatch):
        self.path, self.monkeypatch, self.code, self.document = path, monkeypatch, 0, session(1)
        self.log = ""
        self.command: list[str] | None = None
        for name in INPUTS:
            monkeypatch.delenv(f"INPUT_{name}", raising=False)
        for name, value in {"GITHUB_WORKSPACE": "repository", "RUNNER_TEMP": "temp", "GITHUB_OUTPUT": "output"}.items():
            monkeypatch.setenv(name, str(path / value))
        monkeypatch.setenv("GITHUB_SHA", MAIN)
        monkeypatch.setenv("INPUT_REPORT", "false")
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path / "summary"))
        (path / "repository").mkdir()
        (path / "repository" / "model.safetensors").write_bytes(b"weights")
        monkeypatch.setattr(action, "pytest_perf", self._pytest)

    def _pytest(self, options, run: Path, storage: Path) -> int:
        self.command, self.storage = options, storage
        run.parent.mkdir(parents=True)
        (run.parent / "pytest.log").write_text(self.log)
        if self.document is not None:
            run.write_text(json.dumps(self.document))
        return self.code

    def run(self, **inputs: str) -> int:
        for name, value in inputs.items():
            self.monkeypatch.setenv(f"INPUT_{name.upper()}", value)
        return action.run()

    @property
    def outputs(self) -> dict[str, str]:
        return dict(line.partition("=")[::2] for line in (self.path / "output").read_text().splitlines())

    @property
    def saved(self) -> list[str]:
        return [path.name for path in (self.path / "repository" / ".benchmarks").glob("*.json")]


def test_checkpoint_of_another_repository_is_measured_and_stored(step):
    assert step.run(model="sd2", ckpt="model.safetensors", batch="1 4") == 0
    checkpoint = str(step.path / "repository" / "model.safetensors")
    assert step.command == ["--model", "sd2", "--ckpt", checkpoint, "--batch", "1", "--batch", "4"]
    written = {"run": str(step.path / "temp/sd-perf/run.json"), "report": ""}
    assert step.outputs == {"verdict": "measured", "exit-code": "0", "reason": "", **written}
    assert step.saved == ["0001_aaaaaaaaaaaa.json"]


def test_comparison_outputs_its_verdict_and_is_not_stored(step):
    step.code, step.document = 20, judged(session(1), "SLOWER")
    assert step.run(set="published", compare="true") == ExitCode.SLOWER
    assert step.command == ["-m", "published", "--benchmark-compare"]
    assert (step.outputs["verdict"], step.outputs["exit-code"]) == ("SLOWER", "20")
    assert step.saved == []
    assert "SLOWER" in (step.path / "summary").read_text()


def test_named_run_is_the_baseline(step):
    step.run(compare="0007_release")
    assert step.command == ["--benchmark-compare=0007_release"]


def test_arguments_have_shell_quoting_without_a_shell(step):
    step.run(arguments="--attention mha -k 'a b' --prompt=$(id)")
    assert step.command == ["--attention", "mha", "-k", "a b", "--prompt=$(id)"]


def test_failed_pytest_is_could_not_measure(step):
    step.code, step.document = 1, None
    assert step.run(set="smoke") == 1
    reason = "an image failed its check, or a configuration could not be measured"
    assert step.outputs == {**UNMEASURED, "exit-code": "1", "reason": reason}
    assert "could not measure" in (step.path / "summary").read_text()


@pytest.mark.parametrize(
    "log, reason",
    [
        ("ERROR: --attention: 'new': choose from original, mha\n", "--attention: 'new': choose from original, mha"),
        ("! _pytest.outcomes.Exit: perf: cpu is being measured by pid 7 !\n", "perf: cpu is being measured by pid 7"),
        (
            "__ a __\nINVALID tiny-b1: failed: KeyError\nE   ValueError: x\n",
            "INVALID tiny-b1: failed: KeyError; ValueError: x",
        ),
    ],
)
def test_reason_is_that_of_pytest(step, log, reason):
    step.code, step.document, step.log = 1, None, f"collected 4 items\n{log}1 failed in 3 s\n"
    assert step.run() == 1
    assert step.outputs["reason"] == reason
    assert "could not measure" in (step.path / "temp/sd-perf/comment.md").read_text()


def test_further_inputs_and_the_report(step):
    for name in ("model.yaml", "engine.py"):
        (step.path / "repository" / name).write_text("")
    root = step.path / "repository"
    step.run(engine="engine.py:Mine", attention="sdpa mha", steps="20", report="true")
    assert step.command == [
        *("--steps", "20", "--attention", "sdpa", "--attention", "mha", "--engine", f"{root}/engine.py:Mine"),
        f"--perf-report={step.path / 'temp/sd-perf/report'}",
    ]
    step.run(
        engine="mine:Engine",
        attention="",
        steps="",
        report="false",
        model="sd2",
        ckpt="model.safetensors",
        config="model.yaml",
    )
    assert step.command[-4:] == ["--config", f"{root}/model.yaml", "--engine", "mine:Engine"]
    with pytest.raises(Refusal, match="the input engine: there is no"):
        step.run(engine="absent.py:Mine")
    assert "the input engine: there is no" in step.outputs["reason"]


def test_commit_of_a_run_is_that_of_the_caller(step):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=step.path / "repository", check=True, capture_output=True, text=True).stdout

    git("init", "-q", "-b", "theirs")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    assert step.run() == 0
    (stored,) = (step.path / "repository" / ".benchmarks").glob("*.json")
    commit = json.loads(stored.read_text())["commit_info"]
    assert (commit["id"], commit["branch"]) == (git("rev-parse", "HEAD").strip(), "theirs")


def test_invalid_run_is_could_not_measure(step):
    step.document = {"benchmarks": []}
    assert step.run() == 1
    assert (step.outputs["verdict"], step.outputs["exit-code"]) == ("could not measure", "1")


def test_sha256_of_a_checkpoint_is_checked(step):
    right = hashlib.sha256(b"weights").hexdigest()
    assert step.run(model="sd2", ckpt="model.safetensors", ckpt_sha256=right) == 0
    with pytest.raises(Refusal, match="has the SHA-256"):
        step.run(ckpt_sha256="0" * 64)
    assert step.outputs["exit-code"] == "4"


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"set": "nightly"}, "there is no set"),
        ({"set": "published ladder"}, "one set"),
        ({"model": "sdxl"}, "there is no model"),
        ({"model": "sd2", "ckpt": "absent.ckpt"}, "there is no"),
        ({"ckpt": "model.safetensors", "ckpt_sha256": "abc"}, "64 hex digits"),
        ({"batch": "1;id"}, "no number"),
        ({"compare": "../other"}, "the input compare"),
        ({"arguments": "--prompt 'open"}, "invalid quoting"),
    ],
)
def test_invalid_input_is_refused_before_measuring(step, inputs, message):
    with pytest.raises(Refusal, match=message):
        step.run(**inputs)
    assert step.command is None
    assert step.outputs["reason"] and {**step.outputs, "reason": ""} == {**UNMEASURED, "exit-code": "4", "reason": ""}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("torch999", "peers"), "constraints/ has: torch112.txt"),
        (("torch215;id", "peers"), "invalid torch"),
        (("../torch215", "peers"), "invalid torch"),
        (("torch215", "peers]; id"), "extras are names"),
    ],
)
def test_unknown_pins_and_extras_are_refused_before_installing(arguments, message):
    script = ROOT / ".github" / "scripts" / "install"
    done = subprocess.run(["bash", str(script), *arguments], capture_output=True, text=True, timeout=20)
    assert done.returncode == ExitCode.REFUSED
    assert message in done.stdout


def test_every_input_of_the_action_is_read_by_the_scripts():
    yaml = pytest.importorskip("yaml")
    text = yaml.safe_load((ROOT / ".github" / "actions" / "perf" / "action.yml").read_text())
    steps = text["runs"]["steps"]
    (step,) = [step for step in steps if step.get("id") == "measure"]
    others = {"artifact": "name", "pull-request": "PULL_REQUEST", "token": "GH_TOKEN"}
    assert len(step["env"]) + len(others) == len(text["inputs"])
    scripts = "".join((ROOT / ".github" / "scripts" / name).read_text() for name in ("action.py", "run-action"))
    for name in text["inputs"]:
        if name in others:
            given = [{**step.get("env", {}), **step.get("with", {})}.get(others[name]) for step in steps]
            assert f"${{{{ inputs.{name} }}}}" in given
            continue
        variable = "INPUT_" + name.upper().replace("-", "_")
        assert step["env"][variable] == f"${{{{ inputs.{name} }}}}"
        assert variable in scripts
    assert set(text["outputs"]) == {"verdict", "exit-code", "run", "reason", "report"}


def test_the_key_of_the_package_cache_has_no_comma(tmp_path):
    """With one, actions/cache ends the job. Other pins and other extras are other keys."""
    keys = []
    for extras in ("peers,report", "peers"):
        (tmp_path / "output").write_text("")
        environment = {"PATH": os.environ["PATH"], "GITHUB_OUTPUT": str(tmp_path / "output"), "INPUT_EXTRAS": extras}
        subprocess.run(["bash", str(ROOT / ".github" / "scripts" / "cache-key")], env=environment, check=True)
        (line,) = (tmp_path / "output").read_text().splitlines()
        keys.append(line.removeprefix("key="))
    assert all(re.fullmatch(r"torch215-[a-z+]+-[0-9a-f]{16}", key) for key in keys) and keys[0] != keys[1]
