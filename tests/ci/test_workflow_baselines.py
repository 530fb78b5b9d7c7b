"""Tests of .github/scripts/promote.py and perf-data: promotion, pruning, and the branch of baselines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import promote
import pytest
import saved_runs
from workflow import Refusal
from workflow_runs import MAIN, REVIEWED, SCRIPTS, Runner, judged, left, session, stored

from perf.analysis.verdicts import ExitCode


@pytest.fixture
def runner(tmp_path) -> Runner:
    return Runner(tmp_path)


def sessions(runner: Runner, series: str = "published") -> list[str]:
    return sorted(path.name for path in (runner.path / "baselines" / "h200" / series).rglob("*.json"))


def promoted(runner: Runner, **more: str) -> str:
    done = runner.run("promote.py", **more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert runner.summary.startswith("## Baselines")
    return done.stdout


def test_complete_session_of_main_is_promoted_by_commit_and_machine(runner):
    stored(runner.path / "baselines")
    left(runner.path / "artifacts", session(9))
    text = promoted(runner)
    assert "h200 published: promoted as 0009_aaaaaaaaaaaa_00000000.json" in text
    assert len(sessions(runner)) == 9
    (folder,) = (runner.path / "baselines" / "h200" / "published").iterdir()
    assert "torch2.15.0" in folder.name
    assert "570.86" in folder.name


def test_the_first_session_of_a_machine_is_promoted(runner):
    left(runner.path / "artifacts", session(1))
    assert "promoted as 0001_aaaaaaaaaaaa_00000000.json" in promoted(runner)


def remove(made):
    del made["benchmarks"][1]


def shorten(made):
    info = made["benchmarks"][1]["extra_info"]
    info["launches"].pop()
    info["anchor"].pop()
    made["benchmarks"][1]["stats"]["data"] = made["benchmarks"][1]["stats"]["data"][:-2]


REFUSED = {
    "one configuration missing": (remove, "missing: tiny-sdpa-b1"),
    "a launch missing": (shorten, "not complete"),
    "all launches fewer than asked for": (lambda made: made["perf"].update(launches=10), "not complete"),
    "an invalid round": (lambda made: made["perf"].update(invalid_rounds=1), "1 of 36 rounds were invalid"),
    "partial": (lambda made: made["perf"].update(partial="deselected 3"), "partial: deselected 3"),
    "invalid": (lambda made: made["perf"].update(invalid="anchor_drift 4 %"), "invalid: anchor_drift"),
    "regressed": (lambda made: made["perf"].update(regressed=["tiny-mha-b1"]), "regressed: tiny-mha-b1"),
    "injected": (lambda made: made["perf"].update(partial="slowed down on purpose"), "slowed down on purpose"),
    "plain": (lambda made: made.pop("perf"), "plain pytest-benchmark file"),
}


@pytest.mark.slow
@pytest.mark.parametrize("change, reason", REFUSED.values(), ids=REFUSED)
def test_incomplete_or_invalid_session_is_never_promoted(runner, change, reason):
    stored(runner.path / "baselines")
    made = session(9)
    change(made)
    left(runner.path / "artifacts", made)
    text = promoted(runner)
    assert "h200 published: not promoted" in text
    assert reason in text
    assert len(sessions(runner)) == 8


def test_slower_session_is_detected_without_its_own_verdict(runner):
    stored(runner.path / "baselines")
    left(runner.path / "artifacts", session(9, slow={"tiny-sdpa-b1": 1.05}))
    assert "not promoted: slower than the baseline: tiny-sdpa-b1" in promoted(runner)
    assert len(sessions(runner)) == 8


def test_slower_main_is_not_promoted_on_any_later_night(runner):
    stored(runner.path / "baselines")
    for night in range(9, 13):
        shutil.rmtree(runner.path / "artifacts", ignore_errors=True)
        left(runner.path / "artifacts", session(night, slow={"tiny-sdpa-b1": 1.05}))
        promoted(runner)
    assert len(sessions(runner)) == 8


@pytest.mark.parametrize("code", [1, 4, 137])
def test_a_session_whose_job_could_not_measure_is_not_promoted(runner, code):
    left(runner.path / "artifacts", session(1), code=code, reasons=("the session was interrupted",))
    assert "not promoted: the session was interrupted" in promoted(runner)


def test_a_reviewed_commit_is_not_promoted(runner):
    left(runner.path / "artifacts", session(1), sha=REVIEWED)
    assert "not of this commit of main" in promoted(runner)
    assert sessions(runner) == []


def test_only_main_writes(runner):
    left(runner.path / "artifacts", session(1))
    done = runner.run("promote.py", GITHUB_REF="refs/heads/topic")
    assert done.returncode == ExitCode.REFUSED
    assert sessions(runner) == []


def test_noisy_aa_session_blocks_promotion_on_its_machine(runner):
    stored(runner.path / "baselines")
    noisy = judged(session(9), "INCONCLUSIVE", "interval_too_wide", 1.0)
    left(runner.path / "artifacts", noisy, series="aa", code=1, reasons=("THE GATE DOES NOT WORK",))
    assert "h200 aa: promoted as" in promoted(runner)  # stored, because it blocks the others
    shutil.rmtree(runner.path / "artifacts")
    left(runner.path / "artifacts", session(10))
    assert "the last A/A session of this machine, 0001_aaaaaaaaaaaa_00000000, was not SAME" in promoted(runner)
    shutil.rmtree(runner.path / "artifacts")
    left(runner.path / "artifacts", judged(session(11), "SAME", "within_margin", 1.0), series="aa")
    promoted(runner)
    shutil.rmtree(runner.path / "artifacts")
    left(runner.path / "artifacts", session(12))
    assert "h200 published: promoted as 0009_" in promoted(runner)


def test_an_aa_session_with_further_launches_is_stored(runner):
    """An undecided pair goes on to 12 launches and more; a session with fewer than requested is not complete."""
    undecided = judged(session(9), "INCONCLUSIVE", "interval_too_wide", 1.0)
    undecided["perf"]["launches"] -= 1
    left(runner.path / "artifacts", undecided, series="aa", code=1, reasons=("THE GATE DOES NOT WORK",))
    assert "h200 aa: promoted as" in promoted(runner)
    shutil.rmtree(runner.path / "artifacts")
    undecided["perf"]["launches"] += 2
    left(runner.path / "artifacts", undecided, series="aa")
    assert "lacks launches or rounds" in promoted(runner)


def test_another_torch_starts_its_own_series(runner):
    stored(runner.path / "baselines")
    made = session(9, slow=dict.fromkeys(saved_runs.IDS, 1.5))
    made["machine_info"]["stack"]["torch"] = "2.16.0+cu132"
    left(runner.path / "artifacts", made)
    assert "promoted as 0001_" in promoted(runner)
    assert len(list((runner.path / "baselines" / "h200" / "published").iterdir())) == 2


def test_a_series_is_pruned_to_the_newest(runner):
    stored(runner.path / "baselines", promote.KEEP)
    left(runner.path / "artifacts", session(promote.KEEP + 1))
    assert "pruned 0001_000000000001_00000000.json" in promoted(runner)
    assert len(sessions(runner)) == promote.KEEP
    assert sessions(runner)[0].startswith("0002_")


def test_pruning_counts_sessions_of_each_machine(tmp_path):
    first = stored(tmp_path, 9)
    for number in range(1, 10):
        made = session(number + 20)
        made["machine_info"]["stack"]["uuid"] = "GPU-1"
        saved_runs.store(first[0].parent, made, number + 20)
    (first[0].parent / "0099_damaged.json").write_text("{")
    deleted = promote.prune(tmp_path, keep=8)
    assert sorted(path.name[:4] for path in deleted) == ["0001", "0021"]
    assert (first[0].parent / "0099_damaged.json").exists()


def test_pruning_below_8_sessions_is_refused(tmp_path):
    paths = stored(tmp_path, 8)
    with pytest.raises(Refusal, match="at least 8"):
        promote.prune(tmp_path, keep=7)
    assert all(path.exists() for path in paths)


@pytest.mark.parametrize(
    "label, series, warning, code, message",
    [
        ("nobody", "published", "ignored: nobody/published: no machine of the fleet", 4, "no machine left an outcome"),
        ("h200", "other", "not promoted: h200 other: invalid outcome", 0, "- nothing to promote"),
    ],
)
def test_outcome_in_a_folder_of_another_name_is_not_promoted(runner, label, series, warning, code, message):
    folder = left(runner.path / "artifacts", session(1))
    there = runner.path / "artifacts" / label / series
    there.parent.mkdir(exist_ok=True)
    folder.rename(there)
    done = runner.run("promote.py")
    assert done.returncode == code
    assert f"::warning::{warning}" in done.stdout and message in done.stdout


# --- the branch


def git(path: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "protocol.file.allow=always"]
    done = subprocess.run(["git", *identity, *arguments], cwd=path, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def clone(tmp_path) -> Path:
    """A clone of a repository with one commit, as the hosted job has it."""
    git(tmp_path, "init", "-q", "--bare", "-b", "main", "origin")
    git(tmp_path, "clone", "-q", "origin", "clone")
    git(tmp_path / "clone", "commit", "-q", "--allow-empty", "-m", "first")
    git(tmp_path / "clone", "push", "-q", "origin", "HEAD:main")
    return tmp_path / "clone"


def data(clone: Path, command: str, folder: str = "baselines", **more: str) -> subprocess.CompletedProcess:
    environment = {"PATH": os.environ["PATH"], "HOME": str(clone.parent), "GITHUB_SHA": MAIN, **more}
    return subprocess.run(
        ["bash", str(SCRIPTS / "perf-data"), command, folder],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_branch_starts_empty_and_grows_by_one_commit_per_push(clone):
    for number in (1, 2):
        git(clone, "fetch", "-q", "origin")
        assert data(clone, "open").returncode == 0
        (clone / "baselines" / f"{number:04d}_run.json").write_text(json.dumps(session(number)))
        done = data(clone, "push")
        assert done.returncode == 0, done.stderr
        git(clone, "worktree", "remove", "--force", "baselines")
    files = git(clone.parent / "origin", "ls-tree", "-r", "--name-only", "perf-data").splitlines()
    assert files == ["0001_run.json", "0002_run.json"]
    assert git(clone.parent / "origin", "log", "--format=%s", "perf-data").splitlines() == [f"Sessions of {MAIN}"] * 2
    assert git(clone.parent / "origin", "log", "--format=%s", "main") == "first"


def test_push_is_repeated_after_a_push_of_another_job(clone):
    other = clone.parent / "other"
    git(clone.parent, "clone", "-q", "origin", "other")
    data(clone, "open")
    (clone / "baselines" / "0001_first.json").write_text("1")
    assert data(clone, "push").returncode == 0
    git(other, "fetch", "-q", "origin")
    data(other, "open")
    for tree, name in ((clone, "0002_second.json"), (other, "0003_third.json")):
        (tree / "baselines" / name).write_text("1")
        done = data(tree, "push")
        assert done.returncode == 0, done.stderr
    assert "another job has pushed" in done.stdout
    files = git(clone.parent / "origin", "ls-tree", "-r", "--name-only", "perf-data").splitlines()
    assert len(files) == 3


def test_push_without_changes_makes_no_commit(clone):
    data(clone, "open")
    assert "no session to add" in data(clone, "push").stdout


def test_export_writes_plain_files(clone):
    done = data(clone, "export", "plain")
    assert (done.returncode, done.stdout) == (0, "there is no branch perf-data yet\n")
    data(clone, "open")
    (clone / "baselines" / "0001_run.json").write_text("{}")
    data(clone, "push")
    git(clone, "fetch", "-q", "origin")
    assert data(clone, "export", "plain").returncode == 0
    assert sorted(path.name for path in (clone / "plain").iterdir()) == [".exported", "0001_run.json"]


def test_the_token_is_in_no_argument(clone, tmp_path):
    data(clone, "open")
    (clone / "baselines" / "0001_run.json").write_text("{}")
    programs = tmp_path / "bin"
    programs.mkdir()
    real = shutil.which("git")
    (programs / "git").write_text(f'#!/bin/sh\necho "$* [$GIT_CONFIG_VALUE_0]" >>"{tmp_path}/log"\nexec {real} "$@"\n')
    (programs / "git").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = data(clone, "push", PATH=path, PUSH_TOKEN="s3cret", GITHUB_SERVER_URL="https://git.example.invalid")
    assert done.returncode == 0, done.stderr
    pushed = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("push")]
    assert pushed == ["push -q origin HEAD:refs/heads/perf-data [AUTHORIZATION: basic eC1hY2Nlc3MtdG9rZW46czNjcmV0]"]


@pytest.mark.parametrize("command", ["", "delete"])
def test_another_command_is_a_usage_error(clone, command):
    assert data(clone, command).returncode != 0
