"""The configuration file of a user's project, and the commands `list`, `run` and `completion`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from inner_session import inner_fixture, machine_fixture  # noqa: F401

from perf.__main__ import COMMANDS, main
from perf.analysis.statistics import MARGIN_FLOOR
from perf.analysis.verdicts import ExitCode
from perf.commands import run_set
from perf.configurations.project import SMALLEST_MARGIN, Project, ProjectError, read_project
from perf.configurations.sets import SETS, SUMMARIES, describe
from perf.launch.process import ROOT

GOOD = """
margin = 0.05

[engines]
mine = "engines.py:Engine"
installed = "package.engines:load"

[sets.nightly]
summary = "our engine and sd"
configurations = [{ engine = "mine", precision = "bf16" }, { attention = "original" }]
steps = [2]

[sets.batches_of_mine]
engine = ["mine", "installed"]
batch = [1, 4]
"""


def test_sets_engines_and_margin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "perf.toml").write_text(GOOD)
    project = read_project(tmp_path)
    assert project.margin == 0.05 and project.summaries["nightly"] == "our engine and sd"
    assert [one.id for one in project.sets["nightly"]] == ["engines.Engine-bf16-steps2", "tiny-original-plms2-b1"]
    assert [one.id for one in project.sets["batches_of_mine"]] == [
        *("engines.Engine", "engines.Engine-b4", "package.engines.load", "package.engines.load-b4")
    ]
    monkeypatch.chdir(tmp_path.parent)
    assert read_project(tmp_path).engines["mine"] == f"{tmp_path.name}/engines.py:Engine", "relative to the file"


def test_file_of_the_documents(tmp_path):
    text = (ROOT / "docs" / "your-pipeline.md").read_text(encoding="utf-8")
    (tmp_path / "perf.toml").write_text(text.partition("```toml\n")[2].partition("```")[0])
    project = read_project(tmp_path)
    assert project.margin == 0.02 and len(project.sets["layers"]) == 4
    assert (ROOT / "examples" / "module_engine.py").is_file()


def test_table_in_pyproject(tmp_path):
    assert read_project(tmp_path) == Project()
    (tmp_path / "pyproject.toml").write_text("[tool.other]\n")
    assert read_project(tmp_path) == Project()
    (tmp_path / "pyproject.toml").write_text("[tool.sd-perf]\nmargin = 0.03\n")
    assert read_project(tmp_path).margin == 0.03
    (tmp_path / "perf.toml").write_text("")
    with pytest.raises(ProjectError, match=r"perf.toml and .*pyproject.toml both configure sd-perf: keep one"):
        read_project(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("margin = 2", "margin: 2 is no fraction of at least 0.01"),
        ("margin = 0.001", "margin: 0.001 is no fraction"),
        ("marign = 0.1", "marign: is unknown; choose from margin, engines, sets"),
        ("engines = 1", "engines: is no table"),
        ("[engines]\nsd = 'a:b'", "engines.sd: choose another name"),
        ("[engines]\nmine = 'nonsense'", "engines.mine: 'nonsense' is not FILE.py:NAME or MODULE:NAME"),
        ("[sets]\nsmoke = {}", "sets.smoke: is the name of a set of sd-perf"),
        ("[sets.'a b']", "sets.a b: is no name of a marker"),
        ("[sets.a]\nbatch = 1", "sets.a.batch: is no list of values"),
        ("[sets.a]\nconfigurations = []", "sets.a.configurations: is no list of tables"),
        ("[sets.a]\nconfigurations = [{colour = 1}]", "sets.a.configurations.colour: is unknown"),
        ("[sets.a]\nattention = ['new']", "sets.a: attention 'new': choose from"),
        ("[sets.a]\nbatch = ['x']", "sets.a.batch: 'x' is not a whole number"),
        ("[sets.a]\nbatch = [1.5]", "sets.a.batch: 1.5 is not a whole number"),
        ("[sets.a]\nbatch = [0]", "sets.a.batch: 0 is below 1"),
        ("[sets.a]\nscale = [-1.0]", "sets.a.scale: -1.0 is below 0"),
        ("[sets.a]\nconfigurations = [{steps = '20'}]", "sets.a.configurations.steps: '20' is not a whole number"),
        ("[sets.a]\nconfigurations = [{checkpointing = 1}]", "checkpointing: 1 is not true or false"),
        ("[sets.a]\nsummary = 1", "sets.a.summary: is no text"),
        ("[sets", "perf.toml: "),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path, inner, text, message):
    (inner.path / "perf.toml").write_text(text)
    assert inner.run("--collect-only", what=()).ret == ExitCode.REFUSED, inner.output
    inner.prints("perf.toml: ", message)
    inner.prints_no("Traceback", "INTERNALERROR")


def test_smallest_margin_is_that_of_the_verdicts():
    assert SMALLEST_MARGIN == MARGIN_FLOOR


def test_sets_and_margin_of_a_session(inner, monkeypatch):
    monkeypatch.chdir(inner.path)
    (inner.path / "engines.py").write_text("")
    (inner.path / "perf.toml").write_text(GOOD)
    assert inner.run("-m", "nightly", what=()).ret == 0, inner.output
    inner.prints("engines.Engine-bf16-steps2", "tiny-original-plms2-b1")
    # A slowdown of 4 % is below the margin of the file.
    inner.machine.slow = {"engines.Engine": 1.04}
    sides = ("--perf-a=--engine mine", "--perf-b=--engine installed")
    assert inner.run(*sides, what=(), launches=6).ret == 0, inner.output
    inner.prints_no("SLOWER")
    (inner.path / "perf.toml").write_text(GOOD.replace("margin = 0.05", ""))
    assert inner.run(*sides, what=(), launches=6).ret == ExitCode.SLOWER, inner.output


def test_unknown_engine_lists_those_of_the_file(inner, monkeypatch):
    monkeypatch.chdir(inner.path)
    (inner.path / "perf.toml").write_text(GOOD)
    assert inner.run("--engine=mien", what=()).ret == ExitCode.REFUSED
    inner.prints("--engine: 'mien': choose from sd, diffusers, mine, installed, or name your own")


# --- commands


def test_list(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "perf.toml").write_text(GOOD)
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(SETS) + 2]] == [*SETS, "nightly", "batches_of_mine"]
    assert all(summary in "\n".join(lines) for summary in SUMMARIES.values())
    assert main(["list", "nightly"]) == 0
    assert "engines.Engine-bf16-steps2  " in capsys.readouterr().out
    assert main(["list", "--json", "nightly"]) == 0
    listed = json.loads(capsys.readouterr().out)["sets"]["nightly"]["configurations"]
    assert listed[0]["precision"] == "bf16" and listed[1]["sentence"].startswith("tiny, original attention, full")
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "deeper")
    assert main(["list", "nightly"]) == 0, "the file of a parent"
    assert "engines.Engine-bf16-steps2  " in capsys.readouterr().out
    assert main(["list", "nihgtly"]) == ExitCode.REFUSED
    assert "there is no set 'nihgtly': choose from published" in capsys.readouterr().err


def test_sentences_tell_the_configurations_of_a_set_apart():
    for name, configurations in SETS.items():
        sentences = [describe(one) for one in configurations]
        assert len(set(sentences)) == len(sentences), name


def test_run_has_the_exit_status_of_pytest(tmp_path, monkeypatch, capsys):
    """Ctrl-C reaches pytest as well, which ends by itself."""
    monkeypatch.chdir(tmp_path)
    started, waits = [], iter([KeyboardInterrupt, 20])

    class Process:
        def __init__(self, command):
            started.append(command)

        def wait(self):
            if (answer := next(waits)) is KeyboardInterrupt:
                raise answer
            return answer

    monkeypatch.setattr(run_set.subprocess, "Popen", Process)
    assert main(["run", "smoke", "--perf-launches", "2", "-x"]) == 20
    assert started[0][0] == sys.executable and started[0][-5:] == ["-m", "smoke", "--perf-launches", "2", "-x"]
    assert main(["run", "smokes"]) == ExitCode.REFUSED
    assert "there is no set 'smokes'" in capsys.readouterr().err and len(started) == 1


def test_run_selects_the_set(tmp_path):
    command = run_set.command("stages", ["--collect-only", "-q"])
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.count("test_txt2img[") == len(SETS["stages"]), done.stdout + done.stderr


def test_without_a_command_the_help_is_printed(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_commands_options_and_sets(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in (*COMMANDS, "--no-compile", "published"))


def test_completion_in_bash(capsys):
    main(["completion", "bash"])
    script = capsys.readouterr().out

    def complete(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        code = f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _sd_perf; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert complete("sd-perf", "com") == ["compare", "completion"]
    assert complete("sd-perf", "compare", "--s") == ["--storage", "--strict"]
    assert complete("sd-perf", "run", "inp") == ["inpaint", "inpaint_smoke"]


def test_json_of_show_and_compare(capsys):
    golden = "tests/runs/0001_synthetic.json"
    assert main(["show", "--json", golden]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["configurations"][0]["id"] == "tiny-original-b1" and run["machine"]["device"] == "cuda"
    status = main(["compare", "--json", golden, golden])
    compared = json.loads(capsys.readouterr().out)
    assert compared["exit"] == status and set(compared["decisions"]) == {each["id"] for each in run["configurations"]}
    assert {"verdict", "reason"} <= set(compared["decisions"]["tiny-original-b1"])
