"""Options of `pytest perf`: usage errors before anything is measured, and the resulting settings."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from inner_session import inner_fixture, machine_fixture  # noqa: F401

from perf.analysis.paired import LOOKS
from perf.analysis.verdicts import ExitCode
from perf.configurations.configuration import CHOICES
from perf.launch.process import Interpreter
from perf.plugin import options

CROSSED = {option: field for option, field, *_ in options.MATRIX if field in CHOICES}


@pytest.mark.parametrize("option", CROSSED)
def test_unknown_value(inner, option):
    assert inner.run(f"{option}=nonsense", what=()).ret == ExitCode.REFUSED
    inner.prints(f"{option}: 'nonsense': choose from {', '.join(CHOICES[CROSSED[option]])}")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch=0"], "--batch: '0' is not a whole number of at least 1"),
        (["--batch=two"], "--batch: 'two' is not a whole number of at least 1"),
        (["--steps=-1"], "--steps: '-1' is not a whole number of at least 1"),
        (["--size=512x"], "--size: '512x': give pixels such as 512, or HEIGHTxWIDTH such as 512x768"),
        (["--sdpa-kernels=math,nonsense"], "--sdpa-kernels: 'nonsense': choose from math, mem_efficient, flash, cudnn"),
        (["--sdpa-kernels=math,"], "--sdpa-kernels: '': choose from"),
        (["--ckpt=absent.ckpt"], "--ckpt: absent.ckpt: there is no such file"),
        (["--config=absent.yaml"], "--config: absent.yaml: there is no such file"),
        (["--config=tox.ini"], "--config describes the weights of --ckpt: give both"),
        (["--perf-launches=0"], "--perf-launches: '0' is not a whole number of at least 1"),
        (["--perf-rounds=-1"], "--perf-rounds: '-1' is not a whole number of at least 1"),
        (["--perf-threads=0"], "--perf-threads: '0' is not a whole number of at least 1"),
        (["--perf-clock=sun"], "argument --perf-clock: invalid choice: 'sun'"),
        (["--perf-inject-slowdown=2"], "--perf-inject-slowdown: a fraction between 0 and 1"),
        (["--perf-inject-slowdown=nan"], "--perf-inject-slowdown: a fraction between 0 and 1"),
        (
            ["--perf-aa", "--perf-against=HEAD"],
            "--perf-aa and --perf-against both give every configuration a second label",
        ),
        (["--perf-inprocess", "--perf-against=HEAD"], "--perf-inprocess has one interpreter and one sd"),
        (["--perf-inprocess", f"--perf-python=a={sys.executable}"], "--perf-inprocess has one interpreter and one sd"),
        (["--perf-python=/usr/bin/python3"], "--perf-python '/usr/bin/python3': give LABEL=PATH"),
        (["--perf-python=a b=/usr/bin/python3"], "give LABEL=PATH"),
        (["--perf-python=old=no/such/python"], "no/such/python is no program"),
        (["--perf-python=old=tox.ini"], "tox.ini is no program"),
        (["--perf-python=old="], "is no program"),
        ([f"--perf-python=a={sys.executable}"] * 2, "--perf-python: one label stands for two interpreters"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_error_before_anything_is_measured(inner, arguments, message):
    result = inner.pytester.runpytest_inprocess(*arguments)
    output = result.stdout.str() + result.stderr.str()
    assert result.ret == ExitCode.REFUSED, output
    assert message in output and "Traceback" not in output and "INTERNALERROR" not in output
    assert inner.machine.opened == []


PERF_TEXTS = (
    "python",
    "against",
    "compile-cache",
    "report",
    "trace",
    "launches",
    "rounds",
    "threads",
    "inject-slowdown",
)
TAKES_TEXT = (
    [option for option, *_ in options.MATRIX] + [f"--perf-{name}" for name in PERF_TEXTS] + ["--benchmark-compare"]
)


@pytest.mark.parametrize("value", ["", " "], ids=["empty", "blank"])
@pytest.mark.parametrize("option", TAKES_TEXT)
def test_empty_value_is_a_usage_error(inner, option, value):
    """An unset variable of a CI script must not select the defaults or compare with nothing."""
    assert inner.run(f"{option}={value}", "--benchmark-save=a").ret == ExitCode.REFUSED, inner.output
    inner.prints(f"{option}: the value is empty; is a variable unset?")
    inner.prints_no("Traceback", "INTERNALERROR")
    assert inner.machine.opened == [] and not inner.saved()


@pytest.fixture
def repository(inner):
    """The inner folder as a git repository with one commit of an `sd`."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    (inner.path / "sd").mkdir()
    (inner.path / "sd" / "__init__.py").write_text("OLD = True\n")
    (inner.path / "sd" / "[odd] name.txt").write_text("")

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=inner.path, check=True, capture_output=True)

    git("init", "-q")
    git("add", "sd")
    git("commit", "-q", "-m", "one")
    git("tag", "v1")
    (inner.path / "sd" / "__init__.py").write_text("OLD = False\n")
    return inner


def test_other_commit(repository):
    name, interpreter, folder = options.other_commit("v1", repository.path)
    with folder:
        assert len(name) == 12 and interpreter.python == sys.executable
        assert (interpreter.source / "sd" / "__init__.py").read_text() == "OLD = True\n"
        assert (interpreter.source / "sd" / "[odd] name.txt").exists()
        assert Interpreter.variables(interpreter)["PYTHONPATH"].startswith(str(interpreter.source))


@pytest.mark.parametrize("reference", ["nonsense", "--help", "v1:sd", ""])
def test_unknown_commit(repository, reference):
    with pytest.raises(pytest.UsageError, match=r"--perf-against .*: (there is no such commit|fatal: )"):
        options.other_commit(reference, repository.path)


def test_against_a_commit_end_to_end(repository):
    repository.machine.base_slow = 1 / 1.05
    assert repository.run("--perf-against=v1", launches=6).ret == ExitCode.SLOWER, repository.output
    sources = {one.source for one in repository.machine.opened}
    assert len(sources) == 2
    assert not any(source.exists() for source in sources if source.name.startswith("sd-perf-base-")), "left behind"
    repository.prints("against ", "(beyond_margin)")


def test_against_an_unknown_commit(repository):
    assert repository.run("--perf-against=nonsense").ret == ExitCode.REFUSED
    repository.prints("--perf-against nonsense: ")
    assert repository.machine.opened == []


def test_against_without_git(inner, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert inner.run("--perf-against=HEAD").ret == ExitCode.REFUSED
    inner.prints("--perf-against needs git, which is not installed")


def test_other_interpreter_is_measured_in_turns(inner, tmp_path):
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    assert inner.run(f"--perf-python=old={python}", "--benchmark-save=a").ret == 0, inner.output
    assert [one["extra_info"]["configuration"]["interpreter"] for one in inner.last()["benchmarks"]] == [None, "old"]
    used = [interpreter.python for interpreter in inner.machine.opened]
    assert used.count(str(python)) == 2, "two launches, by the unresolved link: its target is another environment"


# --- settings


@pytest.fixture
def settings(inner):
    """The settings of a command line."""

    def read(*arguments, device="cpu"):
        config = inner.pytester.parseconfig(*arguments)
        return options.settings(config, device, inner.path, 0.01)

    return read


@pytest.mark.parametrize(
    "device, arguments, expected",
    [
        ("cpu", [], {"clock": "cpu", "threads": 1, "launches": 4, "rounds": 4, "most_rounds": 0, "isolated": True}),
        ("cuda", [], {"clock": "wall", "threads": None, "launches": 10, "rounds": 2, "isolated": True}),
        ("cpu", ["--perf-clock=wall"], {"clock": "wall", "threads": 3}),
        ("cpu", ["--perf-clock=wall", "--perf-threads=2"], {"clock": "wall", "threads": 2}),
        ("cuda", ["--perf-clock=cpu"], {"clock": "cpu", "threads": 1}),
        ("cuda", ["--perf-clock=wall", "--device=cpu", "--device=cuda"], {"clock": "wall", "threads": 3}),
        ("cpu", ["--perf-threads=2"], {"clock": "cpu", "threads": 2}),
        ("cpu", ["--perf-inprocess"], {"launches": 1, "rounds": 5, "isolated": False}),
        ("cuda", ["--perf-inprocess"], {"launches": 1, "rounds": 5, "isolated": False}),
        ("cpu", ["--perf-inprocess", "--perf-launches=3", "--perf-rounds=4"], {"launches": 3, "rounds": 4}),
        ("cuda", ["--benchmark-disable"], {"launches": 1, "rounds": 1, "isolated": False}),
        ("cpu", ["--benchmark-disable", "--benchmark-enable"], {"launches": 4, "isolated": True}),
        (
            "cpu",
            ["--perf-aa"],
            {"aa": True, "variant": "aa", "launches": 8, "rounds": 8, "most_rounds": 24, "looks": LOOKS},
        ),
        ("cpu", ["--perf-aa", "--perf-rounds=3"], {"rounds": 3, "most_rounds": 0}),
        ("cuda", ["--perf-aa"], {"launches": 8, "rounds": 2, "most_rounds": 0, "looks": LOOKS}),
        ("cpu", ["--perf-aa", "--perf-launches=5"], {"launches": 5, "looks": ()}),
        ("cpu", ["--perf-aa", "--perf-inprocess"], {"launches": 1, "looks": ()}),
        ("cpu", ["--perf-resume"], {"resume": True}),
        ("cpu", ["--perf-inject-slowdown=0.05"], {"slowdown": 0.05}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings(settings, monkeypatch, device, arguments, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    result = settings(*arguments, device=device)
    assert {name: getattr(result, name) for name in expected} == expected


def test_every_option_is_described(inner):
    result = inner.pytester.runpytest_inprocess("--help")
    assert result.ret == 0
    text = " ".join(result.stdout.str().split())
    for option, field, *_ in options.MATRIX:
        assert f"{option}={field.upper()}" in text or f"{option} {field.upper()}" in text
    assert "published: the article's five" in " ".join(inner.pytester.runpytest_inprocess("--markers").outlines)
