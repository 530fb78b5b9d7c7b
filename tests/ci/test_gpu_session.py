"""Tests of .github/scripts/gpu_session.py: limits, what comes back, predictions. The steps are real pytest processes."""

from __future__ import annotations

import json
import tarfile
import zipfile
from dataclasses import replace
from importlib import metadata

import gpu_session
import pytest
from gpu_session import PARTS, Step
from workflow import Refusal

from perf.configurations.sets import SETS

QUICK = Step("quick", ("--version",), measures=False)


@pytest.fixture
def part(monkeypatch, tmp_path):
    """Run one part with the given steps; the outcomes and the folder of results."""
    monkeypatch.setattr(gpu_session, "GRACE_SECONDS", 10.0)
    monkeypatch.setattr(gpu_session, "PACK_SECONDS", 1.0)

    def run(*steps: Step, seconds: float = 60.0):
        monkeypatch.setattr(gpu_session, "PARTS", {"1": steps})
        return gpu_session.run_part("1", tmp_path / "out", seconds, rehearsal=True), tmp_path / "out"

    return run


@pytest.fixture
def endless(tmp_path):
    """A step that does not end by itself."""
    test = tmp_path / "test_endless.py"
    test.write_text("import time\n\ndef test_endless():\n    time.sleep(600)\n")
    return Step("endless", (str(test), "--rootdir", str(tmp_path)), measures=False)


def members(path) -> list[str]:
    with tarfile.open(path) as archive:
        return archive.getnames()


def test_a_part_hands_back_its_logs_and_a_summary(part, capsys):
    (outcome,), out = part(QUICK)
    assert (outcome.status, outcome.exit_code, outcome.failed) == ("done", 0, False)
    assert sorted(path.name for path in out.iterdir()) == ["part1-traces.tar.gz", "part1.json", "part1.tar.gz"]
    assert "logs/quick.log" in members(out / "part1.tar.gz")
    (step,) = json.loads((out / "part1.json").read_text())["steps"]
    assert step["name"] == "quick" and step["seconds"] > 0
    assert "quick              done        exit 0" in capsys.readouterr().out


def test_a_failed_step_does_not_end_the_part(part):
    wrong = Step("wrong", ("--no-such-option",), measures=False)
    (first, second), _ = part(wrong, QUICK)
    assert first.failed and first.exit_code == 4 and second.status == "done"
    assert gpu_session.exit_code([first, second]) == 1 and gpu_session.exit_code([second]) == 0


def test_a_step_is_cut_off_at_the_end_of_the_part_and_the_rest_not_started(part, endless):
    (first, second), out = part(endless, QUICK, seconds=16.0)
    assert (first.status, first.exit_code, second.status) == ("cut off", None, "not started")
    assert gpu_session.exit_code([first, second]) == gpu_session.INCOMPLETE == 3
    with tarfile.open(out / "part1.tar.gz") as archive:
        log = archive.extractfile("logs/endless.log")
        assert log is not None and b"KeyboardInterrupt" in log.read()


def test_a_step_with_a_limit_leaves_the_rest_of_the_part_to_the_next(part, endless):
    (first, second), _ = part(replace(endless, limit=4.0), QUICK)
    assert (first.status, second.status, second.exit_code) == ("cut off", "done", 0)


def test_a_file_that_could_not_come_back_is_left_out(monkeypatch, part, capsys):
    monkeypatch.setattr(gpu_session, "MOST_BYTES", 10)
    _, out = part(QUICK)
    assert [path.name for path in out.iterdir()] == ["part1.json"]
    assert "part1.tar.gz has 0 MiB" in capsys.readouterr().out


def test_references_stay_behind(tmp_path):
    """And a journal comes back: it has the rounds of a step that was killed."""
    for name in ("runs/cpu/references/a.npz", "runs/cpu/journal/1.jsonl", "runs/cpu/0001_a.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    gpu_session._pack(tmp_path / "a.tar.gz", tmp_path, ("runs",))
    back = {"runs/cpu/0001_a.json", "runs/cpu/journal/1.jsonl"}
    assert {name for name in members(tmp_path / "a.tar.gz") if "." in name} == back


def test_every_set_exists_and_every_step_has_a_prediction():
    steps = [step for part in PARTS.values() for step in part]
    named = [step.arguments[step.arguments.index("-m") + 1] for step in steps if "-m" in step.arguments]
    assert {name for name in named if " " not in name} <= set(SETS)
    predictions = gpu_session.read_json(gpu_session.PREDICTIONS)
    names = {part: {step.name for step in steps} for part, steps in PARTS.items()}
    for kind in ("gpu", "rehearsal"):
        assert {part: set(steps) for part, steps in predictions[kind].items()} == names, kind
    for part, seconds in predictions["gpu"].items():
        assert sum(seconds.values()) <= gpu_session.PART_SECONDS, part


def test_a_rehearsal_takes_the_embedded_model_on_a_cpu(tmp_path):
    for part in PARTS.values():
        for step in part:
            command = gpu_session.command_of(step, tmp_path, rehearsal=True)
            models = [command[i + 1] for i, word in enumerate(command) if word == "--model"]
            assert models == (["tiny"] if step.measures else [])
    assert "sd2-v" in gpu_session.command_of(PARTS["5"][0], tmp_path, rehearsal=False)


def test_wheels_are_installed_without_an_index(tmp_path, monkeypatch):
    # By its metadata: importing pip makes setuptools leave `distutils` alone, for this whole process.
    if not list(metadata.distributions(name="pip")):
        pytest.skip("made by uv, without pip")
    monkeypatch.setattr("sys.path", [*gpu_session.sys.path])
    monkeypatch.setenv("PYTHONPATH", "before")
    with pytest.raises(Refusal, match="has no wheels"):
        gpu_session.install(tmp_path, tmp_path / "site")
    with zipfile.ZipFile(tmp_path / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "value = 1\n")
        wheel.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr("carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carried-1.0.dist-info/RECORD", "")
    gpu_session.install(tmp_path, tmp_path / "site")
    import carried

    assert carried.value == 1 and gpu_session.os.environ["PYTHONPATH"].endswith(f"{gpu_session.os.pathsep}before")


def test_a_step_that_misses_the_first_interrupt_is_interrupted_again(part, tmp_path):
    test = tmp_path / "test_deaf.py"
    test.write_text(
        "import signal, time\n\ndef test_deaf():\n    signal.signal(signal.SIGINT, lambda *_: signal.signal("
        "signal.SIGINT, signal.default_int_handler))\n    time.sleep(600)\n"
    )
    step = Step("deaf", (str(test), "--rootdir", str(tmp_path)), measures=False)
    (outcome,), out = part(step, seconds=14.0)
    assert outcome.status == "cut off"
    with tarfile.open(out / "part1.tar.gz") as archive:
        assert b"KeyboardInterrupt" in archive.extractfile("logs/deaf.log").read()


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(gpu_session, "REQUIRED", ("json", "no_such_package"))
    with pytest.raises(Refusal, match="lacks no_such_package: take their wheels"):
        gpu_session._require_packages("1")
    monkeypatch.setattr(gpu_session, "REQUIRED", ("json",))
    monkeypatch.setattr(gpu_session, "REQUIRED_BY", {"3": ("no_such_peer",)})
    gpu_session._require_packages("1")
    with pytest.raises(Refusal, match="lacks no_such_peer"):
        gpu_session._require_packages("3")
