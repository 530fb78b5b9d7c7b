"""What is published of what the machines left: gathered as data, said in a comment, posted. .github/scripts/publish.py and post.py."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import outcomes
import publish
import pytest
import words
from house import Refusal
from workflow_runs import MAIN, REVIEWED, Runner, judged, left, session, stored

from perf.analysis.verdicts import ExitCode


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The environment of the publishing step; `run` returns (comment, outputs)."""
    for name in ("artifacts", "baselines", "publish"):
        monkeypatch.setenv(name.upper(), str(tmp_path / name))
    monkeypatch.setenv("SHA", MAIN)
    monkeypatch.setenv("EXPECTED", '["h200"]')
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "output"))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    monkeypatch.setattr(publish, "report", lambda runs, baselines, folder: bool(runs))

    def run() -> tuple[str, dict[str, str]]:
        assert publish.run() == 0
        comment = (tmp_path / "publish" / "comment.md").read_text(encoding="utf-8")
        assert comment.rstrip() in (tmp_path / "summary").read_text(encoding="utf-8")
        lines = (tmp_path / "output").read_text().splitlines()
        return comment, dict(line.partition("=")[::2] for line in lines)

    return run


def test_a_slower_pull_request_is_told_by_how_much(job, tmp_path):
    left(tmp_path / "artifacts", judged(session(9), "SLOWER"), code=20, sha=REVIEWED, against=MAIN)
    comment, found = job()
    assert comment.startswith("# perf: SLOWER\n")
    assert "| h200 | published | **slower** |" in comment
    assert "tiny-sdpa-b1 | **SLOWER**" in comment
    assert r"\+5.0 %" in comment
    assert f"Commit {REVIEWED[:12]} against {MAIN[:12]}." in comment
    assert found == {"page": "true", "exit_code": "20"}


def test_what_could_not_be_measured_is_not_called_slower(job, tmp_path):
    left(tmp_path / "artifacts", None, code=1, reasons=("it was interrupted",))
    comment, found = job()
    assert comment.startswith("# perf: could not measure - this says nothing about the speed of the change\n")
    assert "it was interrupted" in comment
    assert "slower" not in comment.lower()
    assert found == {"page": "false", "exit_code": "1"}


def test_one_machine_slower_and_one_that_could_not_measure(job, tmp_path):
    left(tmp_path / "artifacts", judged(session(9), "SLOWER"), code=20)
    left(tmp_path / "artifacts", None, series="ladder", code=4)
    comment, found = job()
    assert found["exit_code"] == "1"
    assert comment.index("| h200 | ladder | **could not measure**") < comment.index("| h200 | published | **slower**")


def test_a_machine_that_left_nothing_is_named(job):
    comment, found = job()
    assert "| h200 | - | **could not measure** | it left nothing |" in comment
    assert found["exit_code"] == "1"


def test_missing_configurations_are_listed_and_fail(job, tmp_path):
    stored(tmp_path / "baselines")
    made = judged(session(9), "SAME", "within_margin", 1.0)
    del made["benchmarks"][1]
    left(tmp_path / "artifacts", made)  # the job's own outcome says that all is well
    comment, found = job()
    assert r"missing: tiny-sdpa-b1" in comment
    assert found["exit_code"] == "1"


def test_all_well(job, tmp_path):
    left(tmp_path / "artifacts", judged(session(9), "SAME", "within_margin", 1.0))
    comment, found = job()
    assert comment.startswith("# perf: not slower\n")
    assert found == {"page": "true", "exit_code": "0"}


def test_started_by_hand_it_is_no_failure_that_no_machine_answered(job, monkeypatch):
    monkeypatch.setenv("EXPECTED", "[]")
    comment, found = job()
    assert "rendered anew" in comment
    assert found["exit_code"] == "0"


def test_texts_of_the_machine_are_no_markup(job, tmp_path):
    evil = "</details><script>alert(1)</script> @everyone [x](https://example.invalid) | cell"
    left(tmp_path / "artifacts", None, code=1, reasons=(evil,))
    comment, _ = job()
    for markup in ("<script", "</details>", "@everyone", "[x](", "https://", " | cell"):
        assert markup not in comment


def test_a_run_cannot_start_commands_of_the_runner(job, tmp_path, capsys):
    folder = left(tmp_path / "artifacts", None)
    (folder / "outcome.json").write_text('{"schema": 1, "x": "\\n::set-output name=exit_code::0"}')
    job()
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("::set-output")]


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}', "x" * 2_000_000], ids=["cut", "list", "empty", "large"])
def test_a_damaged_outcome_is_could_not_measure(job, tmp_path, text):
    folder = left(tmp_path / "artifacts", session(9))
    (folder / outcomes.FILE).write_text(text)
    comment, found = job()
    assert "what it left cannot be used" in comment
    assert found["exit_code"] == "1"


def test_links_of_an_artifact_are_not_followed(job, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps(session(9)))
    folder = left(tmp_path / "artifacts", session(9))
    (folder / outcomes.RUN).unlink()
    os.symlink(secret, folder / outcomes.RUN)
    comment, _ = job()
    assert "it left no run" in comment
    assert not list((tmp_path / "publish").rglob("*.json"))


def test_folders_of_no_machine_of_the_fleet_are_left(job, tmp_path):
    left(tmp_path / "artifacts", session(9), label="stranger")
    comment, _ = job()
    assert "stranger" not in comment
    assert not list((tmp_path / "publish").rglob("*.json"))


@pytest.mark.parametrize("text", ["h200", '["other"]', "{}", "[1]"])
def test_labels_of_no_fleet_are_refused(monkeypatch, text):
    monkeypatch.setenv("EXPECTED", text)
    with pytest.raises(Refusal, match="no list of labels"):
        publish.expected_labels()


def test_a_comment_is_never_longer_than_github_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(words, "LIMIT", 3_000)
    folder = left(tmp_path, judged(session(9), "SAME", "within_margin", 1.0))
    one = outcomes.load(folder)
    text = words.text([(one, folder / outcomes.RUN)] * 5)
    assert len(text) < 3_200
    assert text.count("<details>") == text.count("</details>") > 0
    assert text.endswith("The rest is in the report.\n")


@pytest.mark.slow
@pytest.mark.report
def test_the_page_has_all_machines_and_no_session_twice(tmp_path):
    for package in ("matplotlib", "plotly"):
        pytest.importorskip(package, reason="the extra `report` is not installed")
    runner = Runner(tmp_path)
    stored(tmp_path / "baselines", 3)
    left(tmp_path / "artifacts", session(3))  # has been promoted since
    left(tmp_path / "artifacts", judged(session(9), "SAME", "within_margin", 1.0), series="ladder")
    done = runner.run("publish.py", SHA=MAIN, EXPECTED='["h200"]')
    assert done.returncode == 0, done.stdout + done.stderr
    assert runner.outputs == {"page": "true", "exit_code": "0"}
    page = (tmp_path / "publish" / "report" / "index.html").read_text(encoding="utf-8")
    assert "Synthetic GPU" in page
    summary = (tmp_path / "publish" / "report" / "summary.md").read_text(encoding="utf-8")
    assert "3 older or other sessions" in summary  # four in all: three stored, and the one that is not


# --- posting


def post(runner: Runner, **more: str):
    comment = runner.path / "comment.md"
    comment.write_text("# perf: SLOWER\n")
    return runner.run("post.py", **{"PULL_REQUEST": "12", "COMMENT": str(comment), **more})


def test_the_comment_is_posted_on_its_pull_request(tmp_path):
    runner = Runner(tmp_path)
    assert post(runner).returncode == 0
    assert runner.log == [
        f"gh api --method POST repos/octo-org/sd-perf/issues/12/comments -F body=@{tmp_path / 'comment.md'}"
    ]


@pytest.mark.parametrize("number", ["12/../13", "$(id)", "0", "main", "1 2"])
def test_a_number_that_is_none_is_refused(tmp_path, number):
    runner = Runner(tmp_path)
    assert post(runner, PULL_REQUEST=number).returncode == ExitCode.REFUSED
    assert runner.log == []


def test_a_comment_that_is_not_taken_is_an_error(tmp_path):
    runner = Runner(tmp_path)
    done = post(runner, FAKE_STATUS="1")
    assert done.returncode == ExitCode.REFUSED
    assert "could not be posted" in done.stdout
    shutil.rmtree(runner.path / "bin")
    assert post(runner, PATH=str(Path("/nonexistent"))).returncode == ExitCode.REFUSED
