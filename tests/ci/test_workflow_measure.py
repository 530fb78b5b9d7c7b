"""Tests of the GPU job: outcomes and exit statuses from runs and pytest's exit codes, the summary, the canary."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import canary
import measure
import outcomes
import pytest
import saved_runs
from workflow import Refusal
from workflow_runs import MAIN, REVIEWED, Runner, judged, left, session, stored

from perf.analysis.verdicts import ExitCode


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """The environment of the step, with a fake pytest that takes exit code and run from `answers`."""
    return Machine(tmp_path, monkeypatch)


class Machine:
    def __init__(self, path: Path, monkeypatch):
        self.path, self.commands, self.answers = path, [], []
        for name, value in {
            "LABEL": "h200",
            "SETS": "published",
            "SHA": MAIN,
            "GITHUB_SHA": MAIN,
            "RUNNER_TEMP": str(path),
            "BASELINES": str(path / "baselines"),
        }.items():
            monkeypatch.setenv(name, value)
        for name in ("BATCH", "AGAINST", "MORE", "WHAT", "DEVICE", "GITHUB_STEP_SUMMARY"):
            monkeypatch.delenv(name, raising=False)
        for module in (measure, canary):
            monkeypatch.setattr(module, "pytest_perf", self)
            monkeypatch.setattr(module, "record_environment", lambda out, device: None)

    def __call__(self, options: list[str], run: Path, storage: Path) -> int:
        self.commands.append(options)
        self.storage = sorted(path.name for path in storage.rglob("*.json"))
        code, document = self.answers.pop(0)
        if document is not None:
            run.parent.mkdir(parents=True, exist_ok=True)
            run.write_text(json.dumps(document))
        return code

    def outcome(self, series: str = "published") -> outcomes.Outcome:
        return outcomes.load(self.path / "perf" / "h200" / series)


def test_unchanged_session_is_not_slower(machine):
    stored(machine.path / "baselines")
    machine.answers = [(0, judged(session(9), "SAME", "within_margin", 1.0))]
    assert measure.run() == ExitCode.OK
    assert machine.outcome().status == "not slower"
    (command,) = machine.commands
    assert command == ["-m", "published", "--device", "cuda", "--benchmark-compare"]
    assert len(machine.storage) == 8


def test_compared_session_is_not_stored(machine):
    before = [path.read_bytes() for path in stored(machine.path / "baselines")]
    machine.answers = [(0, session(9))]
    measure.run()
    after = sorted((machine.path / "baselines").rglob("*.json"))
    assert [path.read_bytes() for path in after] == before


def test_slower_differs_from_could_not_measure(machine):
    machine.answers = [(20, judged(session(9), "SLOWER")), (1, session(9))]
    assert measure.run() == ExitCode.SLOWER
    assert machine.outcome().status == "slower"
    assert measure.run() == ExitCode.FAILED
    assert machine.outcome().status == "could not measure"
    assert machine.outcome().reasons == ("an image failed its check, or a configuration could not be measured",)


@pytest.mark.parametrize(
    "code, reason",
    [(2, "interrupted"), (3, "internal error"), (4, "refused"), (5, "no configuration"), (137, "exited with 137")],
)
def test_other_exit_codes_are_could_not_measure(machine, code, reason):
    machine.answers = [(code, None)]
    assert measure.run() == ExitCode.FAILED
    assert reason in machine.outcome().reasons[0]
    assert "no saved run" in machine.outcome().reasons


def test_missing_configuration_fails(machine):
    stored(machine.path / "baselines")
    made = session(9)
    del made["benchmarks"][1]
    machine.answers = [(0, made)]
    assert measure.run() == ExitCode.FAILED
    outcome = machine.outcome()
    assert (outcome.status, outcome.missing) == ("could not measure", (saved_runs.IDS[1],))


def test_new_configuration_is_listed_and_passes(machine):
    for path in stored(machine.path / "baselines"):
        made = json.loads(path.read_text())
        del made["benchmarks"][2]
        path.write_text(json.dumps(made))
    machine.answers = [(0, session(9))]
    assert measure.run() == ExitCode.OK
    assert machine.outcome().new == (saved_runs.IDS[2],)


@pytest.mark.parametrize(
    "change, status, reason",
    [
        (lambda made: made["perf"].update(invalid="anchor_drift 4.1 %"), "could not measure", "session is invalid"),
        (
            lambda made: made["perf"].update(regressed=[saved_runs.IDS[0]]),
            "slower",
            "the run has the verdict SLOWER, but exit code 0",
        ),
        (lambda made: made.update(judged(made, "INVALID", "wrong_image")), "could not measure", "INVALID"),
        (lambda made: made.update(benchmarks="none"), "could not measure", "is not a list"),
    ],
)
def test_run_that_contradicts_its_exit_code_fails(machine, change, status, reason):
    made = session(9)
    change(made)
    machine.answers = [(0, made)]
    measure.run()
    assert machine.outcome().status == status
    assert reason in machine.outcome().reasons[0]


def test_all_sets_are_measured_after_a_failure(machine, monkeypatch):
    monkeypatch.setenv("SETS", "published ladder")
    monkeypatch.setenv("BATCH", "1 4")
    monkeypatch.setenv("MORE", "--perf-launches 6 --prompt 'a b'")
    machine.answers = [(1, None), (0, session(9))]
    assert measure.run() == ExitCode.FAILED
    assert [command[1] for command in machine.commands] == ["published", "ladder"]
    assert machine.commands[0][4:] == [
        *("--batch", "1", "--batch", "4", "--perf-launches", "6", "--prompt", "a b", "--benchmark-compare")
    ]
    assert machine.outcome("ladder-b1-4").status == "not slower"


def test_unfit_machine_is_could_not_measure(machine, monkeypatch):
    def unfit(out, device):
        raise Refusal("the machine is not fit to measure (perf doctor)")

    monkeypatch.setattr(measure, "record_environment", unfit)
    assert measure.run() == ExitCode.FAILED
    assert machine.outcome().reasons == ("the machine is not fit to measure (perf doctor)",)
    assert machine.commands == []


def git(*arguments: str, path: Path) -> str:
    done = subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", *arguments],
        cwd=path,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_pull_request_is_measured_against_its_merge_base(machine, monkeypatch):
    tree = machine.path / "tree"
    tree.mkdir()
    git("init", "-q", "-b", "main", path=tree)
    git("commit", "-q", "--allow-empty", "-m", "base", path=tree)
    base = git("rev-parse", "HEAD", path=tree)
    git("checkout", "-q", "-b", "topic", path=tree)
    git("commit", "-q", "--allow-empty", "-m", "topic", path=tree)
    git("commit", "-q", "--allow-empty", "-m", "moved", path=tree)
    monkeypatch.setattr(measure, "ROOT", tree)
    monkeypatch.setenv("AGAINST", "main")
    monkeypatch.setenv("SHA", REVIEWED)
    stored(machine.path / "baselines")
    stored(machine.path / "baselines", 2, series="aa")
    machine.answers = [(0, judged(session(9), "SAME", "within_margin", 1.0))]
    assert measure.run() == ExitCode.OK
    assert machine.commands[0][-2:] == ["--perf-against", base]
    assert len(machine.storage) == 2  # the A/A sessions of this machine, not the sessions of main
    assert machine.outcome().against == base


def test_commit_of_main_is_not_compared_with_itself(machine, monkeypatch):
    tree = machine.path / "tree"
    tree.mkdir()
    git("init", "-q", "-b", "main", path=tree)
    git("commit", "-q", "--allow-empty", "-m", "base", path=tree)
    monkeypatch.setattr(measure, "ROOT", tree)
    monkeypatch.setenv("AGAINST", "main")
    assert measure.run() == ExitCode.FAILED
    assert "this commit is part of main" in machine.outcome().reasons[0] and machine.commands == []


def test_commit_without_a_merge_base_is_could_not_measure(machine, monkeypatch):
    monkeypatch.setenv("AGAINST", "origin/no-such-branch")
    assert measure.run() == ExitCode.FAILED
    assert "no commit in common" in machine.outcome().reasons[0]


@pytest.mark.parametrize(
    "name, value", [("SETS", "published;id"), ("LABEL", "other"), ("SHA", "main"), ("BATCH", "$(id)")]
)
def test_invalid_settings_are_refused(machine, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(Refusal):
        measure.run()
    assert machine.commands == []


def test_empty_run_of_a_failed_pytest_is_deleted_and_its_reason_kept(tmp_path, monkeypatch, capsys):
    class Pytest:
        stdout = iter(["collected 3 items\n", "ERROR: --attention: 'new': choose from original, mha\n"])

        def __init__(self, command, **_):
            (tmp_path / "run.json").touch()

        def wait(self):
            return 4

    monkeypatch.setattr(measure.subprocess, "Popen", Pytest)
    assert measure.pytest_perf([], tmp_path / "run.json", tmp_path / "storage") == 4
    assert not (tmp_path / "run.json").exists()
    assert "collected 3 items" in capsys.readouterr().out, "the log of the job has all lines"
    log = tmp_path / measure.LOG
    assert measure.reasons_of(4, log) == ("--attention: 'new': choose from original, mha",)
    log.write_text("nothing of note\n")
    assert measure.reasons_of(4, log) == ("the command line or the baseline was refused",)


# --- outcomes as data


@pytest.mark.parametrize(
    "key, value",
    [
        ("label", "../h200"),
        ("series", ""),
        ("sha", "main"),
        ("exit_code", "0"),
        ("exit_code", True),
        ("has_run", 1),
        ("reasons", "none"),
        ("missing", [1]),
        ("against", "HEAD"),
        ("schema", 2),
        ("surplus", 1),
    ],
)
def test_invalid_outcome_is_refused(tmp_path, key, value):
    folder = left(tmp_path, None)
    document = json.loads((folder / outcomes.FILE).read_text())
    document[key] = value
    (folder / outcomes.FILE).write_text(json.dumps(document))
    with pytest.raises(Refusal):
        outcomes.load(folder)


def test_outcome_is_read_as_written(tmp_path):
    folder = left(tmp_path, None, code=20, reasons=("one",), new=("a",), against=REVIEWED)
    assert outcomes.load(folder) == outcomes.Outcome("h200", "published", MAIN, 20, ("one",), (), ("a",), REVIEWED)


def test_job_has_the_exit_code_of_the_worst_outcome():
    def code(*codes):
        return outcomes.exit_code(outcomes.Outcome("h200", "published", MAIN, code) for code in codes)

    assert code(0, 0) == ExitCode.OK
    assert code(0, 21) == ExitCode.INCONCLUSIVE
    assert code(21, 20, 0) == ExitCode.SLOWER
    assert code(20, 1, 0) == ExitCode.FAILED
    assert code(4) == code(137) == code() == ExitCode.FAILED


# --- the summary of the job


def test_summary_names_the_slower_configurations(tmp_path):
    runner = Runner(tmp_path)
    left(runner.out.parent, judged(session(9), "SLOWER"), code=20)
    done = runner.run("summary.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert runner.summary.startswith("# perf: SLOWER\n")
    assert "tiny-sdpa-b1 | **SLOWER**" in runner.summary


def test_summary_of_a_job_without_outcomes(tmp_path):
    runner = Runner(tmp_path)
    assert runner.run("summary.py").returncode == 0
    assert runner.summary == (
        "# perf: could not measure - no result for the speed of the change\n\nNothing was measured.\n\n"
    )


# --- the canary


def test_canary_passes_when_5_percent_is_slower_and_aa_is_same(machine, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(machine.path / "summary"))
    machine.answers = [
        (0, judged(session(1), "SAME", "within_margin", 1.0)),
        (20, judged(session(2), "SLOWER")),
    ]
    assert canary.run() == ExitCode.OK
    same, slow = machine.commands
    assert same[-1] == "--perf-aa"
    assert slow[-2:] == ["--perf-aa", "--perf-inject-slowdown=0.05"]
    assert (machine.path / "summary").read_text().startswith("## canary: the gate works\n")


@pytest.mark.parametrize(
    "same, slow, reason",
    [
        ((0, "SAME"), (0, "SAME"), "SAME with exit code 0, expected SLOWER"),
        ((0, "SAME"), (0, "INCONCLUSIVE"), "INCONCLUSIVE with exit code 0, expected SLOWER"),
        ((0, "SAME"), (0, "SLOWER"), "SLOWER with exit code 0, expected SLOWER"),  # no job would fail
        ((20, "SLOWER"), (20, "SLOWER"), "SLOWER with exit code 20, expected SAME"),
        ((0, "INCONCLUSIVE"), (20, "SLOWER"), "INCONCLUSIVE with exit code 0, expected SAME"),
        ((0, None), (20, "SLOWER"), "no verdict with exit code 0"),
    ],
)
def test_canary_fails_for_a_gate_that_cannot_fail(machine, same, slow, reason):
    reasons = {"SAME": "within_margin", "SLOWER": "beyond_margin", "INCONCLUSIVE": "interval_too_wide"}
    machine.answers = [
        (code, judged(session(number), verdict, reasons[verdict]) if verdict else session(number))
        for number, (code, verdict) in enumerate((same, slow), 1)
    ]
    assert canary.run() == ExitCode.FAILED
    outcomes_reasons = [machine.outcome(series).reasons[0] for series in canary.TRIALS]
    assert any("THE GATE DOES NOT WORK" in it and reason in it for it in outcomes_reasons), outcomes_reasons


def test_canary_that_could_not_measure_does_not_blame_the_gate(machine):
    machine.answers = [(4, None), (0, None)]
    assert canary.run() == ExitCode.FAILED
    first, second = (machine.outcome(series).reasons[0] for series in canary.TRIALS)
    assert first == "the command line or the baseline was refused"
    assert second.startswith("no valid run")


def test_canary_on_a_noisy_machine_does_not_blame_the_gate(machine):
    made = judged(session(1), "INVALID", "anchor_drift")
    made["perf"]["invalid"] = "anchor_drift 4.3 %, 3 % allowed"
    machine.answers = [(1, made), (1, session(2))]
    assert canary.run() == ExitCode.FAILED
    first, second = (machine.outcome(series).reasons[0] for series in canary.TRIALS)
    assert first == "could not measure: anchor_drift 4.3 %, 3 % allowed"
    assert second == "could not measure: an image failed its check, or a configuration could not be measured"
