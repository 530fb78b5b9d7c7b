"""Tests of .github/scripts/resolve.py: the measurement of each event, and refused events."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import saved_runs
from workflow_runs import EVENTS, MAIN, REVIEWED, Runner, session

from perf.analysis.verdicts import ExitCode
from perf.configurations.sets import SETS


@pytest.fixture
def runner(tmp_path) -> Runner:
    return Runner(tmp_path)


def test_nightly_measures_the_published_set_on_the_fleet(runner):
    done = runner.on_event("schedule_nightly", "schedule")
    assert done.returncode == 0, done.stdout + done.stderr
    assert runner.outputs == {
        "run": "true",
        "sha": MAIN,
        "labels": '["h200"]',
        "sets": "published",
        "batch": "",
        "against": "",
        "promote": "true",
        "pull_request": "",
        "timeout_minutes": "170",  # 15 configurations x 10 launches x 30 s, twice, and 20 minutes to install
    }
    assert "GPU budget: about 75 minutes" in done.stdout


def test_weekly_measures_every_set_of_full_size_models(runner):
    assert runner.on_event("schedule_weekly", "schedule").returncode == 0
    sets = runner.outputs["sets"].split()
    assert set(sets) == set(SETS) - {"smoke", "stages", "inpaint_smoke", "training_smoke", "peers_cpu"}


def test_a_push_measures_batch_1(runner):
    assert runner.on_event("push", "push").returncode == 0
    outputs = runner.outputs
    assert (outputs["sets"], outputs["batch"], outputs["promote"], outputs["against"]) == ("published", "1", "true", "")


def test_dispatch_measures_its_inputs(runner):
    assert runner.on_event("dispatch", "workflow_dispatch").returncode == 0
    assert (runner.outputs["sets"], runner.outputs["batch"]) == ("ladder", "1 4")


@pytest.mark.parametrize("event, name", [("dispatch_reviewed", "workflow_dispatch"), ("comment", "issue_comment")])
def test_a_reviewed_commit_is_compared_with_main_and_never_promoted(runner, event, name):
    done = runner.on_event(event, name)
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = runner.outputs
    assert (outputs["sha"], outputs["against"], outputs["promote"]) == (REVIEWED, "origin/main", "false")


def test_a_maintainers_comment_names_commit_set_batch_and_labels(runner):
    assert runner.on_event("comment", "issue_comment").returncode == 0
    outputs = runner.outputs
    assert (outputs["batch"], outputs["labels"], outputs["pull_request"]) == ("1 2", '["h200"]', "12")
    assert "repos/octo-org/sd-perf/collaborators/octo-cat/permission" in runner.log[0]
    assert "repos/octo-org/sd-perf/pulls/12/commits" in runner.log[1]


def test_a_short_comment_measures_the_published_five_at_batch_1(runner):
    done = runner.on_event("comment_short", "issue_comment")
    assert done.returncode == 0
    assert (runner.outputs["sets"], runner.outputs["batch"]) == ("published", "1")
    assert runner.outputs["timeout_minutes"] == "145"  # 5 configurations x 10 launches x 30 s: PAIRED_TIMES
    assert "GPU budget: about 50 minutes" in done.stdout


REFUSED = {
    "comment_of_user": "only a maintainer",
    "comment_of_bot": "only a maintainer",
    "comment_on_issue": "no pull request",
    "comment_branch": "'main' is no commit",
    "comment_head": "'refs/pull/12/head' is no commit",
    "comment_short_sha": "is no commit",
    "comment_upper_sha": "is no commit",
    "comment_longer_sha": "is no commit",
    "comment_no_sha": "is no commit",
    "comment_injected": "there is no set",
    "comment_two_lines": "only set=, batch= and labels= are allowed",
    "comment_option": "only set=, batch= and labels= are allowed",
    "comment_twice": "each once",
    "comment_label": "there is no label 'self-hosted'",
    "comment_batch": "no number",
}


@pytest.mark.parametrize("event", REFUSED)
def test_a_comment_that_is_refused_starts_nothing(runner, event):
    done = runner.on_event(event, "issue_comment")
    assert done.returncode == ExitCode.REFUSED
    assert REFUSED[event] in done.stdout
    assert done.stdout.splitlines()[-1].startswith("::error::")
    unanswered = event in ("comment_of_user", "comment_of_bot", "comment_on_issue")
    assert set(runner.outputs) == (set() if unanswered else {"pull_request", "refusal"})
    assert not list(runner.path.rglob("injected"))


def test_every_comment_fixture_is_tested():
    fixtures = {path.stem for path in EVENTS.glob("comment*.json")}
    assert fixtures == {*REFUSED, "comment", "comment_short"}


@pytest.mark.parametrize("right", ["read", "none", "triage", "write\nadmin", ""])
def test_user_without_write_permission_is_refused(runner, right):
    done = runner.on_event("comment", "issue_comment", FAKE_PERMISSION=right)
    assert done.returncode == ExitCode.REFUSED
    assert "may write" in done.stdout
    assert set(runner.outputs) == {"pull_request", "refusal"} and runner.outputs["pull_request"] == "12"


def test_a_commit_of_another_pull_request_is_refused(runner):
    done = runner.on_event("comment", "issue_comment", FAKE_COMMITS="b" * 40)
    assert done.returncode == ExitCode.REFUSED
    assert "is no commit of pull request 12" in done.stdout


def test_error_of_github_is_refused(runner):
    (runner.path / "bin" / "gh").write_text("#!/bin/sh\necho 'HTTP 500' >&2\nexit 1\n")
    done = runner.on_event("comment", "issue_comment")
    assert done.returncode == ExitCode.REFUSED
    assert "HTTP 500" in done.stdout


@pytest.mark.parametrize(
    "event, name, message",
    [
        ("schedule_unknown", "schedule", "no set belongs"),
        ("push", "pull_request", "starts no measurement"),
        ("push", "pull_request_target", "starts no measurement"),
        ("absent", "push", "there is no such file"),
    ],
)
def test_other_events_are_refused(runner, event, name, message):
    done = runner.on_event(event, name)
    assert done.returncode == ExitCode.REFUSED
    assert message in done.stdout


@pytest.mark.parametrize("sha", ["main", "", "A" * 40, "a" * 39])
def test_invalid_sha_of_the_event_is_refused(runner, sha):
    assert runner.on_event("push", "push", GITHUB_SHA=sha).returncode == ExitCode.REFUSED
    assert runner.outputs == {}


def store(runner: Runner, sha: str, seconds: float = 1200.0) -> Path:
    """One session of a commit, as promote.py stores it."""
    folder = runner.path / "baselines" / "h200" / "published" / "stack"
    folder.mkdir(parents=True)
    made = session()
    made["perf"]["seconds"] = seconds
    return saved_runs.store(folder, made, label=f"{sha[:12]}_00000000")


def test_nightly_of_a_measured_commit_is_skipped(runner):
    store(runner, MAIN)
    done = runner.on_event("schedule_nightly", "schedule")
    assert done.returncode == 0
    assert (runner.outputs["run"], runner.outputs["promote"]) == ("false", "false")
    assert "main has not moved" in done.stdout


def test_timeout_is_twice_the_duration_of_the_newest_session(runner):
    store(runner, "b" * 40)
    assert runner.on_event("schedule_nightly", "schedule").returncode == 0
    assert (runner.outputs["run"], runner.outputs["timeout_minutes"]) == ("true", "60")


def test_push_measures_a_measured_commit_again(runner):
    store(runner, MAIN)
    assert runner.on_event("push", "push").returncode == 0
    assert runner.outputs["run"] == "true"


def test_a_dispatch_from_a_branch_is_never_promoted(runner):
    assert runner.on_event("dispatch", "workflow_dispatch", GITHUB_REF="refs/heads/topic").returncode == 0
    assert (runner.outputs["promote"], runner.outputs["against"]) == ("false", "origin/main")


def test_canary_runs_on_the_fleet(runner):
    event = runner.path / "event.json"
    event.write_text(json.dumps({"schedule": "11 5 * * 3"}))
    assert runner.run("resolve.py", "canary", GITHUB_EVENT_PATH=str(event)).returncode == 0
    assert runner.outputs == {"labels": '["h200"]'}
    event.write_text(json.dumps({"inputs": {"labels": "nobody"}}))
    assert runner.run("resolve.py", "canary", GITHUB_EVENT_PATH=str(event)).returncode == ExitCode.REFUSED
