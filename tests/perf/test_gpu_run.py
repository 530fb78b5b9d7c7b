"""The runbook for a borrowed GPU: order, limits, what was cut off, and going on. The steps are real pytest processes."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest

from perf.commands import gpu_run

QUICK = gpu_run.Step("correctness", ("--version",), "first", measures=False)


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.setattr(gpu_run, "GRACE_SECONDS", 20.0)

    def use(*chosen):
        monkeypatch.setattr(gpu_run, "STEPS", chosen)

    return use


def _run(out, *more):
    parser = argparse.ArgumentParser()
    gpu_run.add_arguments(parser)
    return gpu_run.run(parser.parse_args(["--out", str(out), "--budget", "10m", *more]))


@pytest.mark.parametrize("text, seconds", [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200)])
def test_durations(text, seconds):
    assert gpu_run.seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-1", "1d", "nan"])
def test_what_is_no_duration(text):
    with pytest.raises(argparse.ArgumentTypeError, match="give seconds"):
        gpu_run.seconds(text)


def test_a_step_that_is_done_is_not_run_again(tmp_path, steps, capsys):
    steps(QUICK)
    assert _run(tmp_path) == _run(tmp_path) == 0
    assert capsys.readouterr().out.count("at most") == 1
    assert json.loads((tmp_path / "state.json").read_text())["correctness"]["status"] == "done"


@pytest.mark.slow
def test_a_failed_step_is_said_and_the_next_one_runs(tmp_path, steps, capsys):
    steps(replace(QUICK, name="wrong", arguments=("--no-such-option",)), QUICK)
    assert _run(tmp_path) == 1
    assert "wrong          new      exit 4" in capsys.readouterr().out
    assert "no-such-option" in (tmp_path / "wrong.log").read_text()


def test_tests_that_cannot_be_collected_are_a_failure_and_not_an_interruption(tmp_path, steps, capsys):
    """Both are pytest's exit 2."""
    broken = tmp_path / "test_broken.py"
    broken.write_text("import no_such_module\n")
    steps(replace(QUICK, arguments=(str(broken),)))
    assert _run(tmp_path) == 1
    assert "correctness    done     exit 2" in capsys.readouterr().out


def test_ctrl_c_leaves_a_step_to_be_gone_on_with(tmp_path, steps, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    steps(QUICK)
    monkeypatch.setattr(gpu_run, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())["correctness"]
    assert state["status"] == "cut off" and state["seconds"] > 0


@pytest.mark.slow
def test_a_step_that_is_too_long_is_cut_off_and_gone_on_with(tmp_path, steps, capsys):
    endless = tmp_path / "test_endless.py"
    endless.write_text("import time\n\ndef test_endless():\n    time.sleep(600)\n")
    steps(
        replace(QUICK, name="endless", arguments=(str(endless), "-p", "no:cacheprovider", "--rootdir", str(tmp_path)))
    )
    assert _run(tmp_path, "--chunk", "24s") == 0  # less the grace, 4 s
    out = capsys.readouterr().out
    assert "endless        cut off  exit 2" in out
    assert "left: endless" in out
    assert "KeyboardInterrupt" in (tmp_path / "endless.log").read_text()
    endless.write_text("def test_endless():\n    pass\n")
    assert _run(tmp_path) == 0
    assert "endless        done     exit 0" in capsys.readouterr().out


@pytest.mark.slow
def test_tests_that_passed_are_not_run_again(tmp_path, steps, monkeypatch):
    """Minutes on a borrowed GPU: a step of tests that was cut off goes on with those that it did not reach."""
    monkeypatch.chdir(tmp_path)  # as in a clone: names of tests are those of the folder they run in
    file, ran = tmp_path / "test_two.py", tmp_path / "ran"
    code = "import time\n\ndef test_a():\n    open({ran!r}, 'a').write('a')\n\ndef test_b():\n    {second}\n"
    file.write_text(code.format(ran=str(ran), second="time.sleep(600)"))
    arguments = (str(file), "-rp", "-p", "no:cacheprovider", "--rootdir", str(tmp_path))
    steps(replace(QUICK, name="two", arguments=arguments))
    assert _run(tmp_path, "--chunk", "24s") == 0
    assert ran.read_text() == "a"
    file.write_text(code.format(ran=str(ran), second=f"open({str(ran)!r}, 'a').write('b')"))
    assert _run(tmp_path) == 0
    assert ran.read_text() == "ab"
    assert "1 passed, 1 deselected" in (tmp_path / "two.log").read_text()


def test_nothing_starts_without_time_for_it(tmp_path, steps, capsys):
    steps(QUICK)
    assert _run(tmp_path, "--chunk", "10s") == 0
    assert "left: correctness" in capsys.readouterr().out


def test_a_damaged_state_is_refused_by_name(tmp_path, steps):
    steps(QUICK)
    (tmp_path / "state.json").write_text('{"correctness": 3}')
    with pytest.raises(SystemExit, match="cannot be read"):
        _run(tmp_path)


def test_every_set_that_is_named_exists():
    from perf.configurations.sets import SETS

    named = [step.arguments[step.arguments.index("-m") + 1] for step in gpu_run.STEPS if "-m" in step.arguments]
    assert set(named) <= {*SETS, "gpu"}
    assert {"published", "ladder", "peers"} <= set(named)


def test_another_model_takes_the_place_of_a_steps_own(tmp_path, steps, monkeypatch):
    """With two of them `pytest perf` would cross both."""
    seen = []

    class Process:
        def __init__(self, command, **_):
            seen.append([command[n + 1] for n, one in enumerate(command) if one == "--model"])

        def wait(self, timeout):
            return 0

    monkeypatch.setattr(gpu_run.subprocess, "Popen", Process)
    steps(*gpu_run.STEPS)
    assert _run(tmp_path / "a", "--model", "tiny") == 0
    assert seen == [[]] + [["tiny"]] * (len(gpu_run.STEPS) - 1)
    seen.clear()
    assert _run(tmp_path / "b") == 0
    assert ["sd2-v"] in seen and ["sd2"] in seen and [] in seen
