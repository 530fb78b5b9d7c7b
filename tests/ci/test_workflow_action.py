"""Tests of .github/scripts/action.py, the step of the composite action: inputs, pytest's options, outputs."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import action
import pytest
from workflow import Refusal
from workflow_runs import MAIN, ROOT, judged, session

from perf.analysis.verdicts import ExitCode

INPUTS = ("SET", "MODEL", "CKPT", "CKPT_SHA256", "BATCH", "COMPARE", "ARGUMENTS", "STORAGE")


@pytest.fixture
def step(tmp_path, monkeypatch):
    return Step(tmp_path, monkeypatch)


class Step:
    """The step in another repository's workflow, with a fake pytest that writes `document` and exits with `code`."""

    def __init__(self, path: Path, monkeypatch):
        self.path, self.monkeypatch, self.code, self.document = path, monkeypatch, 0, session(1)
        self.command: list[str] | None = None
        for name in INPUTS:
            monkeypatch.delenv(f"INPUT_{name}", raising=False)
        for name, value in {"GITHUB_WORKSPACE": "repository", "RUNNER_TEMP": "temp", "GITHUB_OUTPUT": "output"}.items():
            monkeypatch.setenv(name, str(path / value))
        monkeypatch.setenv("GITHUB_SHA", MAIN)
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path / "summary"))
        (path / "repository").mkdir()
        (path / "repository" / "model.safetensors").write_bytes(b"weights")
        monkeypatch.setattr(action, "pytest_perf", self._pytest)

    def _pytest(self, options, run: Path, storage: Path) -> int:
        self.command, self.storage = options, storage
        if self.document is not None:
            run.parent.mkdir(parents=True)
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
    assert step.outputs == {"verdict": "measured", "exit-code": "0", "run": str(step.path / "temp/sd-perf/run.json")}
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
    assert step.outputs == {"verdict": "could not measure", "exit-code": "1", "run": ""}
    assert "could not measure" in (step.path / "summary").read_text()


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
    assert step.outputs == {"verdict": "could not measure", "exit-code": "4", "run": ""}


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
    (step,) = text["runs"]["steps"]
    assert len(step["env"]) == len(text["inputs"])
    scripts = "".join((ROOT / ".github" / "scripts" / name).read_text() for name in ("action.py", "run-action"))
    for name in text["inputs"]:
        variable = "INPUT_" + name.upper().replace("-", "_")
        assert step["env"][variable] == f"${{{{ inputs.{name} }}}}"
        assert variable in scripts
    assert set(text["outputs"]) == {"verdict", "exit-code", "run"}
