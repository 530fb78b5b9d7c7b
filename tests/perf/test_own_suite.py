"""The fixture `measured` in a user's own suite: sessions, verdicts, real processes, and an inert plugin."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from inner_session import MEASURED, inner_fixture, machine_fixture  # noqa: F401
from selection import slow_or_nightly

from perf.analysis.verdicts import ExitCode
from perf.launch.process import ROOT
from perf.plugin import NAME

SUITE = """
    import pytest

    CALLS = []

    @pytest.mark.parametrize("n", [1, 2])
    def test_mine(measured, n):
        assert measured(lambda: CALLS.append(n) or n) == n

    def test_plain(benchmark):
        benchmark.pedantic(sum, ([1, 2],), rounds=1)
"""
# As an installed sd-perf loads it by its entry point.
INSTALLED = any(entry.name == NAME for entry in entry_points(group="pytest11"))
LOADED = () if INSTALLED else ("-p", "perf.plugin.hooks")
FIRST, SECOND = "test_mine.test_mine[1]", "test_mine.test_mine[2]"


@pytest.fixture
def suite(inner, monkeypatch):
    """A suite with the plugin as its entry point loads it, without a conftest of ours."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (inner.path / "suite" / "test_measured.py").unlink()
    inner.pytester.makeconftest("")
    (inner.path / "suite" / "test_mine.py").write_text(textwrap.dedent(SUITE))

    def run(*arguments):
        result = inner.pytester.runpytest_inprocess("suite", *LOADED, *arguments)
        inner.output = result.stdout.str() + result.stderr.str()
        return result

    inner.call, inner.monkeypatch = run, monkeypatch
    return inner


def test_rounds_of_fresh_processes_with_saved_launches(suite):
    suite.machine.slow = {SECOND: 2.0}
    suite.call("--benchmark-save=a").assert_outcomes(passed=3)
    saved = {each["fullname"]: each for each in suite.last()["benchmarks"]}
    first = saved["suite/test_mine.py::test_mine[1]"]
    assert first["extra_info"]["configuration"]["engine"] == "suite/test_mine.py::test_mine[1]"
    assert len(first["extra_info"]["launches"]) == 4 and len(first["stats"]["data"]) == 16
    assert (
        0.19 < first["stats"]["median"] < 0.21 and saved["suite/test_mine.py::test_mine[2]"]["stats"]["median"] > 0.39
    )
    assert "extra_info" in saved["suite/test_mine.py::test_plain"], "plain benchmarks are measured by pytest-benchmark"
    command = next(filter(None, suite.machine.commands))
    assert command[1:5] == ["-m", "perf.plugin.serve", str(suite.path), "suite/test_mine.py::test_mine[1]"]
    assert "suite" not in command[5:], "its other tests are not run there"
    suite.prints(FIRST)
    suite.prints_no("was not checked", "partial run", "speed-up over", "fastest")
    assert all(each["extra_info"]["speedup"] is None for each in (first, saved["suite/test_mine.py::test_mine[2]"]))


def test_two_tests_of_one_name_are_refused(suite):
    """Their rounds would be stored under one id, and only one of them measured."""
    (suite.path / "suite" / "more").mkdir()
    (suite.path / "suite" / "more" / "test_mine.py").write_text((suite.path / "suite" / "test_mine.py").read_text())
    result = suite.call("--import-mode=importlib")
    assert result.ret == ExitCode.REFUSED, suite.output
    suite.prints(
        f"two tests are both called {FIRST}: suite/", "suite/more/test_mine.py::test_mine[1]", "rename one of them"
    )


def test_stored_sessions_of_the_suite_are_baselines(suite):
    """With storage and comparison as pytest-benchmark has them: no option of ours is given."""
    for _ in range(2):
        suite.call("--benchmark-save=a").assert_outcomes(passed=3)
    assert len({path.parent for path in suite.saved()}) == 1
    suite.machine.slow = {FIRST: 1.5}
    result = suite.call("--benchmark-compare", "-k", "not plain")
    suite.prints(f"{FIRST}", "+50")
    assert result.ret == 0, suite.output  # fewer than six sessions give no verdict


def test_marker_slow_is_that_of_the_suite(suite):
    """Our own slow benchmarks run only if their file is named."""
    marked = textwrap.dedent(SUITE).replace("def test_plain", "@pytest.mark.slow\ndef test_plain")
    (suite.path / "suite" / "test_mine.py").write_text(marked)
    suite.pytester.makeini("[pytest]\nmarkers = slow\n")
    suite.call("--perf-launches=2").assert_outcomes(passed=3)


def test_pairs_within_the_session(suite):
    assert suite.call("--perf-aa", "--perf-launches=6", "-k", "not plain").ret == 0, suite.output
    assert [each["extra_info"]["verdict"]["verdict"] for each in suite.last()["benchmarks"]] == ["SAME", "SAME"]


def test_another_commit_of_the_suite(suite):
    """Both sides run their own version of the test; a commit without the model of sd-perf is refused for our own sets."""

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=suite.path, check=True, capture_output=True)

    git("init", "-q")
    git("add", "suite", "tox.ini")
    git("commit", "-q", "-m", "one")
    (suite.path / "suite" / "test_mine.py").write_text(textwrap.dedent(SUITE) + "NEW = True\n")
    versions = []

    def opened(interpreter, command=None):
        if command:
            folder, test = command[3:5]
            versions.append("NEW" in (Path(folder) / test.partition("::")[0]).read_text())
        return suite.machine(interpreter, command)

    suite.monkeypatch.setattr("perf.session.workers.ProcessLaunch", opened)
    assert suite.call("--perf-against=HEAD", "--perf-launches=6", "-k", "not plain").ret == 0, suite.output
    assert versions.count(False) == 12, "two tests, six launches"
    assert versions.count(True) == 18, "and the control arm"
    suite.prints("against ", "SAME")
    (suite.path / "suite" / "test_measured.py").write_text(MEASURED)
    assert (
        suite.call("--perf-against=HEAD", "--perf-model=tiny", "--perf-steps=2", "-k", "txt2img").ret
        == ExitCode.REFUSED
    )
    suite.prints("that commit has no sd/, the model that these configurations measure")


@pytest.mark.parametrize("option", ["--benchmark-disable", "--collect-only"])
def test_nothing_is_measured(suite, option):
    assert suite.call(option).ret == 0, suite.output
    assert suite.machine.opened == []


@pytest.mark.parametrize(
    "options, message",
    [
        (("--perf-a=--steps 2", "--perf-b=--steps 3"), "--perf-a is for configurations"),
        ((f"--perf-python=other={sys.executable}",), "--perf-python is for configurations"),
        (("--perf-inprocess", "--perf-aa"), "--perf-aa: with --perf-inprocess pytest-benchmark alone times"),
    ],
)
def test_options_without_an_effect_are_refused(suite, options, message):
    assert suite.call(*options).ret == ExitCode.REFUSED, suite.output
    suite.prints(message)
    assert suite.machine.opened == []


@pytest.mark.parametrize("expression, partial", [("not plain", None), ("not 2", "deselected 1")])
@pytest.mark.parametrize("options", [(), ("--perf-launches=2",)], ids=["late", "options"])
def test_a_suite_without_some_of_its_tests_is_partial(suite, expression, partial, options):
    assert suite.call("--benchmark-save=a", "-k", expression, *options).ret == 0, suite.output
    assert suite.last()["perf"]["partial"] == partial


def test_in_process(suite):
    suite.call("--perf-inprocess", "-k", "not plain").assert_outcomes(passed=2)
    assert suite.machine.opened == []


def test_installed_plugin_is_inert_without_measured(suite, monkeypatch):
    """No option name of ours without the prefix, no header, no other storage, no rounds in saved files."""
    (suite.path / "suite" / "test_mine.py").write_text("def test_plain(benchmark):\n    benchmark(sum, [1])\n")
    suite.pytester.makeconftest("def pytest_addoption(parser):\n    parser.addoption('--model', default='theirs')\n")
    monkeypatch.setattr("perf.plugin.hooks.create", None)
    monkeypatch.setattr("perf.plugin.hooks.create_late", None)
    suite.call("--model=mine", "--benchmark-save=a").assert_outcomes(passed=1)
    suite.prints_no("perf:", "perf: torch")
    assert "perf" not in suite.last() and "data" not in suite.last()["benchmarks"][0]["stats"]
    assert suite.saved()[0].parent.parent == suite.path / ".benchmarks"


def test_prefixed_and_short_names_are_the_same_option(inner):
    both = ("--attention=sdpa", "--perf-attention=original", "--perf-steps=2")
    assert inner.run("--collect-only", "-q", what=both).ret == 0, inner.output
    inner.prints("test_txt2img[tiny-sdpa-plms2-b1]", "test_txt2img[tiny-original-plms2-b1]")


def test_codspeed_is_refused_by_name(suite, inner):
    plugin = "def pytest_addoption(parser):\n    parser.addoption('--codspeed', action='store_true')\n"
    inner.pytester.makeconftest(plugin)
    assert suite.call("--codspeed").ret == ExitCode.REFUSED
    suite.prints("--codspeed times a function in this process")
    assert inner.machine.opened == []


REAL = """
    import pytest

    @pytest.fixture
    def numbers(tmp_path):
        yield list(range(200_000))
        assert tmp_path.is_dir()  # which another process would have removed

    def test_sum(measured, numbers):
        assert measured(sum, numbers) == sum(numbers)

    def test_skipped(measured):
        pytest.skip("no numbers today")

    def test_without_a_call(measured):
        pass
"""


@pytest.mark.parametrize("place", slow_or_nightly(["lib", "elsewhere"], lambda place: place == "lib"))
def test_real_processes_of_another_commit(tmp_path, place):
    """A package of the repository comes from that commit where PYTHONPATH has its folder, else the session ends."""

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / place).mkdir()
    (tmp_path / place / "theirs.py").write_text("def work():\n    return sum(range(1000))\n")
    where = "" if place == "lib" else f"import sys\nsys.path.insert(0, {str(tmp_path / place)!r})\n"
    (tmp_path / "conftest.py").write_text(where)
    (tmp_path / "test_theirs.py").write_text(
        "from theirs import work\n\ndef test_work(measured):\n    assert measured(work)\n"
    )
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    (tmp_path / place / "theirs.py").write_text("def work():\n    return sum(range(300_000))\n")
    path = [str(ROOT), *([str(tmp_path / place)] if place == "lib" else [])]
    launches = ("--perf-launches=3", "--perf-rounds=4")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *LOADED, "--perf-against=HEAD", *launches],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    if place == "lib":
        assert done.returncode == ExitCode.SLOWER, done.stdout + done.stderr
    else:
        assert done.returncode == ExitCode.FAILED, done.stdout + done.stderr
        assert f"theirs was imported from {tmp_path / place}" in done.stdout


@pytest.mark.nightly
def test_real_processes(tmp_path):
    (tmp_path / "test_real.py").write_text(textwrap.dedent(REAL))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *LOADED,
            "--perf-launches=2",
            "--perf-rounds=2",
            "-rs",
            "--basetemp=temporary",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed, 1 skipped" in done.stdout and "no numbers today" in done.stdout
    assert "test_real.test_sum" in done.stdout
