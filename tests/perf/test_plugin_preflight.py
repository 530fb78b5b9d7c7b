"""Refusals before measuring, and what else must not be lost or be silent: outputs, reruns, JUnit, commits, names."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from inner_session import SDPA, STRICT, inner_fixture, machine_fixture  # noqa: F401

from perf.analysis.verdicts import ExitCode
from perf.runs.storage import why_unwritable

PLAIN = (
    "from perf.plugin.benchmark_bridge import ReplayClock\nimport pytest\nclock = ReplayClock()\n"
    "@pytest.mark.benchmark(timer=clock)\n"
    "def test_plain(benchmark, seconds=(0.1, 0.1)):\n"
    "    clock.load(seconds)\n    benchmark.pedantic(clock.advance, rounds=2)\n"
)


# --- outputs


@pytest.mark.parametrize(
    "option, problem",
    [
        ("--benchmark-json=file/out.json", "--benchmark-json: file/out.json cannot be written: Not a directory"),
        ("--benchmark-json=suite", "--benchmark-json: suite is a folder; name another file"),
        ("--perf-trace=file", "--perf-trace: file is not a folder; name another folder"),
        ("--perf-report=file", "--perf-report: file is not a folder; name another folder"),
        ("--perf-compile-cache=file/cache", "--perf-compile-cache: file/cache cannot be written: Not a directory"),
    ],
)
def test_unwritable_output_is_refused_before_measuring(inner, option, problem):
    (inner.path / "file").write_text("")
    assert inner.run(option, "--benchmark-save=a").ret == ExitCode.REFUSED, inner.output
    inner.prints(problem)
    assert inner.machine.opened == [] and not inner.saved()


@pytest.mark.parametrize(
    "option, package, remedy",
    [
        ("--benchmark-histogram", "pygal", "--benchmark-histogram needs pygal"),
        ("--perf-report=report", "matplotlib", 'pip install "sd-perf[report]"'),
    ],
)
def test_output_without_its_package_is_refused_before_measuring(inner, monkeypatch, option, package, remedy):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    assert inner.run(option).ret == ExitCode.REFUSED, inner.output
    inner.prints(remedy)
    assert inner.machine.opened == []


def test_why_unwritable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert why_unwritable(tmp_path / "a" / "b.json") is None and why_unwritable(tmp_path / "file") is None
    assert why_unwritable(tmp_path, folder=True) is None and why_unwritable(tmp_path / "a", folder=True) is None
    assert why_unwritable(tmp_path / "file", folder=True) == "is not a folder"
    assert why_unwritable(tmp_path) == "is a folder"
    assert why_unwritable(tmp_path / "file" / "b", folder=True) == "cannot be written: Not a directory"
    assert why_unwritable(Path("/proc/none.json")).startswith("cannot be written: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_unwritable_battery_output_is_refused(tmp_path, capsys):
    from perf.__main__ import main

    assert main(["battery", "--output", str(tmp_path)]) == ExitCode.REFUSED
    assert capsys.readouterr().err == f"error: {tmp_path} is a folder; name another file\n"


# --- reruns, JUnit


def test_rerun_replaces_the_earlier_entry(inner):
    pytest.importorskip("pytest_rerunfailures")
    flaky = PLAIN + "    if not tried:\n        tried.append(1)\n        raise ValueError\n"
    (inner.path / "suite" / "test_plain.py").write_text(flaky.replace("clock =", "tried = []\nclock =", 1))
    assert inner.run("--reruns=1", "--benchmark-save=a").ret == 0, inner.output
    names = [benchmark["name"] for benchmark in inner.last()["benchmarks"]]
    assert names == [f"test_txt2img[{SDPA}]", "test_plain"]
    assert inner.last()["perf"]["partial"] is None
    inner.prints("1 rerun")


def test_junit_has_the_verdict_without_a_warning(inner):
    result = inner.run("--perf-aa", "--junitxml=junit.xml", *STRICT, launches=6)
    assert result.ret == 0, inner.output
    (entry,) = ElementTree.parse(inner.path / "junit.xml").getroot().iter("property")
    assert entry.get("name") == "verdict" and entry.get("value").startswith("SAME ")
    inner.prints_no("PytestWarning")


# --- the commit of the rootdir, names of saved runs


def test_commit_is_that_of_the_rootdir(inner, monkeypatch, tmp_path_factory):
    def git(folder, *arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for folder in (inner.path, elsewhere):
        git(folder, "init", "-q")
        git(folder, "commit", "-q", "--allow-empty", "-m", folder.name)
    commit = git(inner.path, "rev-parse", "HEAD").stdout.strip()
    monkeypatch.chdir(elsewhere)
    options = ("--benchmark-autosave", f"--rootdir={inner.path}", "-c", str(inner.path / "tox.ini"))
    assert inner.run(*options, str(inner.path / "suite")).ret == 0, inner.output
    assert inner.last()["commit_info"]["id"] == commit
    assert inner.saved()[-1].name.startswith(f"0001_{commit}_")
    assert Path(os.getcwd()) == elsewhere


def test_hosted_runners_are_never_compared_across_sessions(inner, monkeypatch):
    monkeypatch.setenv("RUNNER_ENVIRONMENT", "github-hosted")
    assert inner.run("--benchmark-save=a").ret == 0
    assert inner.last()["machine_info"]["stack"]["hosted"] is True
    assert inner.run("--benchmark-compare").ret == 0
    inner.prints("there is no baseline in", "0001_a.json: foreign: a hosted runner")
    assert inner.run("--benchmark-compare", "--perf-strict").ret == ExitCode.REFUSED
    assert inner.run("--benchmark-compare=0001").ret == ExitCode.REFUSED
    inner.prints("a hosted runner, where each job may run on another machine; --perf-against needs no stored run")
    monkeypatch.delenv("RUNNER_ENVIRONMENT")
    assert inner.run("--benchmark-compare=0001").ret == ExitCode.REFUSED, "the stored run is of a hosted runner"


def test_baseline_is_named_by_its_label(inner):
    for name in ("zero", "first", "second"):
        assert inner.run(f"--benchmark-save={name}").ret == 0
    assert inner.run("--benchmark-compare=first").ret == 0, inner.output
    inner.prints("against 0002_first")
    assert inner.run("--benchmark-compare=0003").ret == 0
    inner.prints("against 0003_second")
    assert inner.run("--benchmark-compare=third").ret == ExitCode.REFUSED
    inner.prints("--benchmark-compare=third: no saved run in")
