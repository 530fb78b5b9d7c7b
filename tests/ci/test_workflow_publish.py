"""Tests of .github/scripts/publish.py and post.py: collecting artifacts, the comment, the report, posting."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import outcomes
import publish
import pytest
import summary
from workflow import Refusal
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
    monkeypatch.setattr(publish, "report", lambda runs, baselines, folder: runs.exists())

    def run() -> tuple[str, dict[str, str]]:
        assert publish.run() == 0
        comment = (tmp_path / "publish" / "comment.md").read_text(encoding="utf-8")
        assert comment.rstrip() in (tmp_path / "summary").read_text(encoding="utf-8")
        lines = (tmp_path / "output").read_text().splitlines()
        return comment, dict(line.partition("=")[::2] for line in lines)

    return run


def test_comment_has_the_slowdown_of_a_pull_request(job, tmp_path):
    left(tmp_path / "artifacts", judged(session(9), "SLOWER"), code=20, sha=REVIEWED, against=MAIN)
    comment, outputs = job()
    assert comment.startswith("# perf: SLOWER\n")
    assert "| h200 | published | **slower** |" in comment
    assert "tiny-sdpa-b1 | **SLOWER**" in comment
    assert r"\+5.0 %" in comment
    assert f"Commit {REVIEWED[:12]} against {MAIN[:12]}." in comment
    assert outputs == {"page": "true", "exit_code": "20"}


def test_could_not_measure_is_not_called_slower(job, tmp_path):
    left(tmp_path / "artifacts", None, code=1, reasons=("the session was interrupted",))
    comment, outputs = job()
    assert comment.startswith("# perf: could not measure - no result for the speed of the change\n")
    assert "the session was interrupted" in comment
    assert "slower" not in comment.lower()
    assert outputs == {"page": "false", "exit_code": "1"}


def test_one_machine_slower_and_one_that_could_not_measure(job, tmp_path):
    left(tmp_path / "artifacts", judged(session(9), "SLOWER"), code=20)
    left(tmp_path / "artifacts", None, series="ladder", code=4)
    comment, outputs = job()
    assert outputs["exit_code"] == "1"
    assert comment.index("| h200 | ladder | **could not measure**") < comment.index("| h200 | published | **slower**")


def test_machine_without_an_artifact_is_named(job):
    comment, outputs = job()
    assert "| h200 | - | **could not measure** | no artifact |" in comment
    assert outputs["exit_code"] == "1"


def test_missing_configurations_are_listed_and_fail(job, tmp_path):
    stored(tmp_path / "baselines")
    made = judged(session(9), "SAME", "within_margin", 1.0)
    del made["benchmarks"][1]
    left(tmp_path / "artifacts", made)  # the outcome of the job itself is a success
    comment, outputs = job()
    assert r"missing: tiny-sdpa-b1" in comment
    assert outputs["exit_code"] == "1"


def test_unchanged_session_is_not_slower_in_the_comment(job, tmp_path):
    left(tmp_path / "artifacts", judged(session(9), "SAME", "within_margin", 1.0))
    comment, outputs = job()
    assert comment.startswith("# perf: not slower\n")
    assert outputs == {"page": "true", "exit_code": "0"}


def test_manual_run_without_machines_succeeds(job, monkeypatch):
    monkeypatch.setenv("EXPECTED", "[]")
    comment, outputs = job()
    assert "rendered again" in comment
    assert outputs["exit_code"] == "0"


def test_markup_of_an_artifact_is_escaped(job, tmp_path):
    evil = "</details><script>alert(1)</script> @everyone [x](https://example.invalid) | cell"
    left(tmp_path / "artifacts", None, code=1, reasons=(evil,))
    comment, _ = job()
    for markup in ("<script", "</details>", "@everyone", "[x](", "https://", " | cell"):
        assert markup not in comment


def test_artifact_cannot_start_a_command_of_actions(job, tmp_path, capsys):
    folder = left(tmp_path / "artifacts", None)
    (folder / "outcome.json").write_text('{"schema": 1, "x": "\\n::set-output name=exit_code::0"}')
    job()
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("::set-output")]


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}', "x" * 2_000_000], ids=["cut", "list", "empty", "large"])
def test_damaged_outcome_is_could_not_measure(job, tmp_path, text):
    folder = left(tmp_path / "artifacts", session(9))
    (folder / outcomes.FILE).write_text(text)
    comment, outputs = job()
    assert "invalid outcome" in comment
    assert outputs["exit_code"] == "1"


def test_symbolic_links_of_an_artifact_are_not_followed(job, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps(session(9)))
    folder = left(tmp_path / "artifacts", session(9))
    (folder / outcomes.RUN).unlink()
    os.symlink(secret, folder / outcomes.RUN)
    comment, _ = job()
    assert "no saved run" in comment
    assert not list((tmp_path / "publish").rglob("*.json"))


def test_artifact_outside_the_fleet_is_ignored(job, tmp_path):
    left(tmp_path / "artifacts", session(9), label="unknown")
    comment, _ = job()
    assert "unknown" not in comment
    assert not list((tmp_path / "publish").rglob("*.json"))


@pytest.mark.parametrize("text", ["h200", '["other"]', "{}", "[1]"])
def test_labels_outside_the_fleet_are_refused(monkeypatch, text):
    monkeypatch.setenv("EXPECTED", text)
    with pytest.raises(Refusal, match="no list of labels"):
        publish.expected_labels()


def test_comment_is_cut_at_the_limit_of_github(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "LIMIT", 3_000)
    folder = left(tmp_path, judged(session(9), "SAME", "within_margin", 1.0))
    outcome = outcomes.load(folder)
    text = summary.text([(outcome, folder / outcomes.RUN)] * 5)
    assert len(text) < 3_200
    assert text.count("<details>") == text.count("</details>") > 0
    assert text.endswith("The rest is in the report.\n")


@pytest.mark.slow
@pytest.mark.report
def test_report_has_every_session_once(tmp_path):
    for package in ("jinja2", "matplotlib"):
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
    text = (tmp_path / "publish" / "report" / "summary.md").read_text(encoding="utf-8")
    assert "3 older or other sessions" in text  # four in all: three stored, and the one that is not


# --- posting


def post(runner: Runner, **more: str):
    comment = runner.path / "comment.md"
    comment.write_text("# perf: SLOWER\n")
    return runner.run("post.py", **{"PULL_REQUEST": "12", "COMMENT": str(comment), **more})


def test_comment_is_posted_on_its_pull_request(tmp_path):
    runner = Runner(tmp_path)
    assert post(runner).returncode == 0
    listed, posted = runner.log
    assert "repos/octo-org/sd-perf/issues/12/comments?per_page=100" in listed and 'user.type == "Bot"' in listed
    assert posted.startswith("gh api --method POST repos/octo-org/sd-perf/issues/12/comments -F body=@")
    assert runner.posted == "<!-- sd-perf results -->\n# perf: SLOWER\n"


def test_former_comment_is_replaced(tmp_path):
    runner = Runner(tmp_path)
    assert post(runner, FAKE_COMMENT="77\n78").returncode == 0
    assert runner.log[-1].startswith("gh api --method PATCH repos/octo-org/sd-perf/issues/comments/78 -F body=@")
    assert post(runner, FAKE_COMMENT="77/../../secrets").returncode == ExitCode.REFUSED
    assert post(runner, COMMENT_KEY="--> x").returncode == ExitCode.REFUSED


ANSWER = {"GITHUB_SERVER_URL": "https://example.org", "GITHUB_RUN_ID": "5", "PULL_REQUEST": "12", "RESULT": "success"}


def test_perf_comment_is_acknowledged(tmp_path):
    runner = Runner(tmp_path)
    done = runner.run(
        "answer.py", **ANSWER, SHA="b" * 40, LABELS='["h200", "a10"]', SETS="published ladder", REFUSAL=""
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Measuring bbbbbbbbbbbb against main on `h200`, `a10`: published, ladder." in runner.posted
    assert "[Log](https://example.org/octo-org/sd-perf/actions/runs/5)" in runner.posted


def test_perf_comment_is_refused_with_the_reason(tmp_path):
    runner = Runner(tmp_path)
    done = runner.on_event("comment_injected", "issue_comment")
    assert done.returncode == ExitCode.REFUSED and "there is no set" in runner.outputs["refusal"]
    assert runner.outputs["pull_request"] == "12"
    answered = {**ANSWER, "RESULT": "failure", "REFUSAL": runner.outputs["refusal"] + " <img> @all"}
    assert runner.run("answer.py", **answered, SHA="", LABELS="", SETS="").returncode == 0
    assert "`/perf` is refused: there is no set" in runner.posted
    assert "<img>" not in runner.posted and "@all" not in runner.posted
    assert runner.run("answer.py", **{**ANSWER, "RESULT": "failure"}, REFUSAL="").returncode == 0
    assert "could not be resolved: see the log" in runner.posted


@pytest.mark.parametrize("number", ["12/../13", "$(id)", "0", "main", "1 2"])
def test_invalid_number_of_a_pull_request_is_refused(tmp_path, number):
    runner = Runner(tmp_path)
    assert post(runner, PULL_REQUEST=number).returncode == ExitCode.REFUSED
    assert runner.log == []


def test_rejected_comment_is_an_error(tmp_path):
    runner = Runner(tmp_path)
    done = post(runner, FAKE_STATUS="1")
    assert done.returncode == ExitCode.REFUSED
    assert "could not be posted" in done.stdout
    shutil.rmtree(runner.path / "bin")
    assert post(runner, PATH=str(Path("/nonexistent"))).returncode == ExitCode.REFUSED
