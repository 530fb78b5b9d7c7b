"""The documents tell the truth: commands run, links lead somewhere, what they name exists."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
import subprocess

import pytest
from documents import (
    DOCUMENTS,
    EXTRAS,
    PROGRAMS,
    ROOT,
    SHELLS,
    Block,
    anchors,
    blocks,
    copy_of_the_repository,
    environment,
    links,
    without_code,
)

from perf.__main__ import COMMANDS
from perf.__main__ import main as perf_main
from perf.analysis.verdicts import REASONS as VERDICT_REASONS
from perf.analysis.verdicts import ExitCode, Verdict
from perf.configurations.sets import SETS

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ALL = [block for document in DOCUMENTS for block in blocks(document)]
SHELL = [block for block in ALL if block.language in SHELLS]
SECONDS = 120  # of one block, at most
# Of programs that are not ours.
FOREIGN_OPTIONS = {
    *("--notest", "--check"),  # tox, ruff
    *("--gres", "--exclusive"),  # sbatch
    *("--for", "--timeout"),  # kubectl
}


def named(document) -> str:
    return document.relative_to(ROOT).as_posix()


def runnable(block: Block) -> bool:
    return block.language in (*SHELLS, "python") and block.rule != "not run"


# --- commands


@pytest.mark.slow
@pytest.mark.parametrize("document", [one for one in DOCUMENTS if any(map(runnable, blocks(one)))], ids=named)
def test_commands_run(document, tmp_path):
    """One after the other, as a reader would, in a copy of the repository."""
    copy = copy_of_the_repository(tmp_path / "clone")
    for block in filter(runnable, blocks(document)):
        if block.rule == "put into":
            put(block, copy)
            continue
        if block.rule == "extra" and not all(map(importlib.util.find_spec, EXTRAS[block.values["extra"]])):
            continue
        command = ["bash", "-c", block.script()] if block.language in SHELLS else ["python", "-c", block.text]
        done = subprocess.run(
            command,
            cwd=copy,
            env=environment(copy),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, f"{block.where}:\n{block.text}\n{done.stdout[-4000:]}"
        print(done.stdout)


def put(block: Block, copy) -> None:
    """Insert the block before the one line that the comment names, as a reader with an editor would."""
    path = copy / block.values["file"]
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    (place,) = [number for number, line in enumerate(lines) if line.strip().startswith(block.values["before"])]
    space = "\n\n" if block.text.startswith("def ") else ""
    path.write_text("".join([*lines[:place], block.text, space, *lines[place:]]), encoding="utf-8")


def test_a_command_that_fails_is_noticed(tmp_path):
    for text, rule, values, expected in (
        ("false\ntrue\n", "run", {}, 1),
        ("(exit 3)\n", "may exit", {"status": "1"}, 1),
        ("(exit 1)\ntrue\n", "may exit", {"status": "1"}, 0),
        ("false | true\n", "run", {}, 1),
        ("test one =\n", "run with", {"arguments": "one"}, 0),
    ):
        block = Block(DOCUMENTS[0], 1, "bash", text, rule, values)
        assert subprocess.run(["bash", "-c", block.script()], cwd=tmp_path).returncode == expected, text


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_block_is_run_or_says_why_not(document):
    for block in blocks(document):
        assert block.rule is not None, f"{block.where}: the comment before it means nothing"
        if block.rule != "run":
            assert block.language in (*SHELLS, "python"), block.where
        assert (block.rule == "put into") <= (block.language == "python"), block.where
        assert not block.text.startswith(("python ", "pytest ", "txt2img ", "sd-perf ")) or block.language in SHELLS


def test_there_is_much_to_run():
    """Else a pattern that finds nothing would pass for documents in which all is well."""
    assert len(SHELL) > 25 and sum(map(runnable, SHELL)) > 12
    assert {block.rule for block in ALL} >= {"run", "not run", "run with", "may exit", "put into"}


def parts(block: Block):
    """The commands of a block as lists of words, without what sets the environment."""
    for line in block.commands():
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


@pytest.mark.parametrize("block", [one for one in SHELL if not runnable(one)], ids=lambda block: block.where)
def test_what_cannot_run_here_is_understood(block, pytestconfig):
    """No option that there is not, and no value that is refused."""
    for words in parts(block):
        program, arguments = words[0].rpartition("/")[2], words[1:]
        if program == "python" and arguments[0] == "-m":
            program, arguments = arguments[1], arguments[2:]
        program = PROGRAMS.get(program, program)
        if program in ("sd.txt2img", "sd.img2img"):
            importlib.import_module(program).parser().parse_args(arguments)
        elif program == "perf" and arguments[0] in COMMANDS:
            module, add, *_ = COMMANDS[arguments[0]]
            parser = argparse.ArgumentParser()
            getattr(importlib.import_module(module), add)(parser)
            if "--help" not in arguments:
                parser.parse_args(arguments[1:])
        elif program == "perf":
            assert arguments == ["--version"], block.where
        elif program == "pytest":
            given = pytestconfig._parser.parse_known_args(arguments)
            assert set((given.markexpr or "").replace("not ", "").split()) <= {*SETS, "slow"}, block.where
            options = [one.partition("=")[0] for one in arguments if one.startswith("--")]
            unknown = set(options) - known_options(pytestconfig)
            assert not unknown, f"{block.where}: {unknown}"


# --- what documents name


def known_options(config) -> set[str]:
    """Every long option of pytest, with the plugins that are loaded here."""
    groups = [*config._parser._groups, config._parser._anonymous]
    return {name for group in groups for option in group.options for name in option.names() if name.startswith("--")}


def test_options_exist(pytestconfig, capsys):
    known = known_options(pytestconfig) | FOREIGN_OPTIONS | {"--help", "--version"}
    mains = [importlib.import_module(f"sd.{name}").main for name in ("txt2img", "img2img", "convert", "attention")]
    for main, arguments in [(main, []) for main in mains] + [(perf_main, [name]) for name in COMMANDS]:
        with pytest.raises(SystemExit):
            main([*arguments, "--help"])
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for document in DOCUMENTS:
        for option in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", document.read_text(encoding="utf-8")):
            assert option in known, f"{named(document)}: there is no option {option}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_somewhere(document):
    for link in links(document):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{named(document)}: {link}"
        assert not anchor or anchor in anchors(target), (
            f"{named(document)}: {link}; there are {sorted(anchors(target))}"
        )


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_files_named_exist(document):
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:sd|perf|tests|docs|constraints|\.ci|\.github)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), f"{named(document)}: {name}"


def test_every_document_is_reached_from_the_readme():
    reached = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    assert set(DOCUMENTS) - {ROOT / "README.md"} <= reached


def test_the_checks_find_what_is_wrong(tmp_path):
    made = tmp_path / "x.md"
    made.write_text(
        "# A `b`, c's D-e\n[x](y.md#z) ![p](p.png) `[not](a-link)`\n```bash\n[nor](this)\n# no heading\n```\n"
    )
    assert links(made) == ["y.md#z", "p.png"] and anchors(made) == {"a-b-cs-d-e"}
    assert "not" not in without_code(made.read_text())
    for comment, rule in (
        ("not run: needs a GPU", "not run"),
        ("not run: I do not feel like it", None),
        ("run with --steps 2: takes minutes", "run with"),
        ("something", None),
    ):
        made.write_text(f"<!-- {comment} -->\n```bash\ntrue\n```\n")
        assert [block.rule for block in blocks(made)] == [rule]


def test_the_house_map_is_of_this_house():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    house = text.partition("## The house")[2].partition("One direction")[0]
    folder, found = None, 0
    for line in house.splitlines():
        top = re.match(r"    (\w+)/", line)
        folder = top[1] if top else folder
        for name in re.findall(r"\b\w+\.py\b", line):
            at = [ROOT / name, ROOT / folder / name, ROOT / folder / "tiny" / name] if folder else [ROOT / name]
            assert any(path.is_file() for path in (*at, ROOT / "tests" / name)), f"{folder}/{name}"
            found += 1
    assert found > 60


def test_verdicts_reasons_and_exit_codes_are_the_documented_ones():
    text = (ROOT / "docs" / "verdicts.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, re.MULTILINE))
    assert rows == VERDICT_REASONS
    table = dict(re.findall(r"^\| ([A-Z]+) \|.*\| ([^|]+) \|$", text, re.MULTILINE))
    assert set(table) == {verdict.value for verdict in Verdict}
    assert table["SLOWER"] == f"{ExitCode.SLOWER:d}" and table["INVALID"] == f"{ExitCode.FAILED:d}"
    assert f"or {ExitCode.INCONCLUSIVE:d} with" in table["INCONCLUSIVE"]
    assert f"{ExitCode.REFUSED:d} is a usage error" in text


def test_extras_are_the_documented_ones():
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8").partition("## Extras")[2].partition("## ")[0]
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(project["optional-dependencies"])
    assert "version" not in project and project["dynamic"] == ["version"]
