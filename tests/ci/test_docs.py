"""Tests of the documents: commands run; links, files, options and names exist."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import shlex
import subprocess

import gpu_codegen
import gpu_session
import measured_tables
import peers_table
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
from selection import slow_or_nightly

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
SECONDS = 120  # timeout of one block
# Options of external programs.
FOREIGN_OPTIONS = {
    "--codspeed",  # pytest-codspeed
    *("--notest", "--check"),  # tox, ruff
    *("--gres", "--exclusive"),  # sbatch
    *("--nproc-per-node", "--nnodes"),  # torchrun
    *("--build-arg", "--rm", "--gpus"),  # docker
    "--local-dir",  # hf
    *("--torch-backend", "--python"),  # uv
}


def named(document) -> str:
    return document.relative_to(ROOT).as_posix()


def runnable(block: Block) -> bool:
    return block.language in (*SHELLS, "python") and block.rule != "not run"


# --- commands

# They take from a quarter of a minute to two minutes each.
AT_NIGHT = ["add-attention", "first-five-minutes", "inpainting", "install", "measuring"]
AT_NIGHT += ["prompts-and-images", "samplers", "training", "your-gpu", "your-pipeline"]


@pytest.mark.parametrize(
    "document",
    slow_or_nightly(
        [document for document in DOCUMENTS if any(map(runnable, blocks(document)))],
        lambda document: document.stem not in AT_NIGHT,
    ),
    ids=named,
)
def test_commands_run(document, tmp_path):
    """Run all blocks of a document in order, in a copy of the repository."""
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
    assert untracked(copy) == [], "a command leaves files that .gitignore does not name"


def untracked(copy) -> list[str]:
    """New files of a copy of the repository that git would list, below the folders that it was copied with."""
    command = ["git", "-C", str(copy), "status", "--porcelain", "--untracked-files=normal"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line[3:] for line in lines if line.startswith("??")]


def put(block: Block, copy) -> None:
    """Insert the block before the line that its comment names."""
    path = copy / block.values["file"]
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    (place,) = [number for number, line in enumerate(lines) if line.strip().startswith(block.values["before"])]
    space = "\n\n" if block.text.startswith("def ") else ""
    path.write_text("".join([*lines[:place], block.text, space, *lines[place:]]), encoding="utf-8")


def test_failing_command_fails_the_block(tmp_path):
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
def test_every_block_runs_or_has_a_reason(document):
    for block in blocks(document):
        assert block.rule is not None, f"{block.where}: the comment before it is not in documents.COMMENTS"
        if block.rule != "run":
            assert block.language in (*SHELLS, "python"), block.where
        assert (block.rule == "put into") <= (block.language == "python"), block.where
        assert not block.text.startswith(("python ", "pytest ", "txt2img ", "sd-perf ")) or block.language in SHELLS


def test_enough_blocks_are_found():
    """Guard against a pattern that matches nothing."""
    assert len(SHELL) > 25 and sum(map(runnable, SHELL)) > 12
    assert {block.rule for block in ALL} >= {"run", "not run", "run with", "may exit", "put into"}


def parts(block: Block):
    """Yield the commands of a block as lists of arguments, without environment variables."""
    for line in block.commands():
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


@pytest.mark.parametrize("block", [block for block in SHELL if not runnable(block)], ids=lambda block: block.where)
def test_options_of_skipped_commands_are_valid(block, pytestconfig):
    """Parse the commands: unknown options and invalid values fail."""
    for words in parts(block):
        program, arguments = words[0].rpartition("/")[2], words[1:]
        if program == "python" and arguments[0] == "-m":
            program, arguments = arguments[1], arguments[2:]
        program = PROGRAMS.get(program, program)
        if program in ("sd.txt2img", "sd.img2img", "sd.inpaint", "sd.depth2img", "sd.train"):
            importlib.import_module(program).parser().parse_args(arguments)
        elif program == "torchrun":
            module = arguments.index("-m")
            assert arguments[module + 1] in ("perf.throughput", "sd.train")
            importlib.import_module(arguments[module + 1]).parser().parse_args(arguments[module + 2 :])
        elif program == "perf" and arguments[0] in COMMANDS:
            module, _ = COMMANDS[arguments[0]]
            parser = argparse.ArgumentParser()
            importlib.import_module(module).add_arguments(parser)
            if "--help" not in arguments:
                parser.parse_args(arguments[1:])
        elif program == "perf":
            assert arguments == ["--version"], block.where
        elif program == "pytest":
            parsed = pytestconfig._parser.parse_known_args(arguments)
            known = {*SETS, "slow", "nightly", "or", "gpu_codegen"}
            assert set((parsed.markexpr or "").replace("not ", "").split()) <= known, block.where
            options = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
            unknown = set(options) - known_options(pytestconfig)
            assert not unknown, f"{block.where}: {unknown}"


# --- names in documents


def known_options(config) -> set[str]:
    """Return every long option of pytest and its loaded plugins."""
    groups = [*config._parser._groups, config._parser._anonymous]
    return {name for group in groups for option in group.options for name in option.names() if name.startswith("--")}


def test_options_exist(pytestconfig, capsys):
    known = known_options(pytestconfig) | FOREIGN_OPTIONS | {"--help", "--version"}
    mains = [
        importlib.import_module(f"sd.{name}").main
        for name in ("txt2img", "img2img", "inpaint", "depth2img", "train", "convert", "inspect", "attention.__main__")
    ]
    mains += [importlib.import_module("perf.throughput").main, gpu_codegen.main, gpu_session.run, peers_table.main]
    for main, arguments in [(main, []) for main in mains] + [(perf_main, [name]) for name in COMMANDS]:
        with pytest.raises(SystemExit):
            main([*arguments, "--help"])
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for document in DOCUMENTS:
        for option in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", document.read_text(encoding="utf-8")):
            assert option in known, f"{named(document)}: there is no option {option}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_link_targets_exist(document):
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
def test_named_files_exist(document):
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:sd|perf|tests|docs|constraints|\.ci|\.github)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), f"{named(document)}: {name}"


def test_readme_links_to_every_document():
    reached = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    assert set(DOCUMENTS) - {ROOT / "README.md"} <= reached


def test_document_checks_detect_errors(tmp_path):
    document = tmp_path / "x.md"
    document.write_text(
        "# A `b`, c's D-e\n[x](y.md#z) ![p](p.png) `[not](a-link)`\n```bash\n[nor](this)\n# no heading\n```\n"
    )
    assert links(document) == ["y.md#z", "p.png"] and anchors(document) == {"a-b-cs-d-e"}
    assert "not" not in without_code(document.read_text())
    for comment, rule in (
        ("not run: needs a GPU", "not run"),
        ("not run: I do not feel like it", None),
        ("run with --steps 2: takes minutes", "run with"),
        ("something", None),
    ):
        document.write_text(f"<!-- {comment} -->\n```bash\ntrue\n```\n")
        assert [block.rule for block in blocks(document)] == [rule]


def test_layout_map_matches_the_tree():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    layout = text.partition("## The layout")[2].partition("Imports go one way")[0]
    lines = re.sub(r"\n {20,}", " ", layout).splitlines()  # join continued lines
    packages, modules, top = set(), 0, None
    for line in lines:
        match = re.match(r" {4}(?P<inner>  )?(?P<folder>[a-z_/]+)/ +[^:]+(?:: (?P<modules>.+))?", line)
        if not match or not (match["inner"] or match["folder"] in ("sd", "perf")):
            continue
        top = top if match["inner"] else match["folder"]
        folder = ROOT / top / match["folder"] if match["inner"] else ROOT / top
        packages.add(folder)
        for module in filter(None, (match["modules"] or "").split(", ")):
            assert (folder / f"{module}.py").is_file(), f"{folder.relative_to(ROOT)}/{module}"
            modules += 1
    assert modules > 60
    assert packages == {path.parent for top in ("sd", "perf") for path in (ROOT / top).rglob("__init__.py")}


def test_verdicts_reasons_and_exit_codes_match_the_documents():
    text = (ROOT / "docs" / "verdicts.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, re.MULTILINE))
    assert rows == VERDICT_REASONS
    table = dict(re.findall(r"^\| ([A-Z]+) \|.*\| ([^|]+) \|$", text, re.MULTILINE))
    assert set(table) == {verdict.value for verdict in Verdict}
    assert table["SLOWER"] == f"{ExitCode.SLOWER:d}" and table["INVALID"] == f"{ExitCode.FAILED:d}"
    assert f"or {ExitCode.INCONCLUSIVE:d} with" in table["INCONCLUSIVE"]
    assert f"{ExitCode.REFUSED:d} is a usage error" in text


@pytest.mark.parametrize(
    "run, side, peers, row",
    [
        ("sd2", "sd-fast", ["openvino", "diffusers_compiled"], "AMD EPYC with AVX-512, fp32 (`fast,full`)"),
        ("sd2", "sd-fast-bf16", ["openvino_bf16", None], "AMD EPYC with AVX-512, bf16 (`fast`)"),
        ("avx2_sd2", "sd-fast", ["openvino", "diffusers_compiled"], "AMD EPYC with AVX2 and no AVX-512, fp32 (`fast`)"),
    ],
)
def test_the_readme_states_the_measured_ratios_to_peers(run, side, peers, row):
    run = json.loads((ROOT / "perf" / "baselines" / f"peers_cpu_{run}.json").read_text(encoding="utf-8"))
    (info,) = [made["extra_info"] for made in run["benchmarks"] if made["params"]["side"] == side]
    cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*info[f"ratio_to_{peer}"]) if peer else "" for peer in peers]
    assert readme_row(row) == cells


def readme_row(first: str) -> list[str]:
    """The further cells of the row of a table of the README that begins with this cell."""
    (line,) = [
        line
        for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith(f"| {first} |")
    ]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_the_readme_states_the_measured_times_of_a_gpu():
    rows = [
        row.split(" | ")[2]
        for name in ("peers", "")
        for row in measured_tables.table(gpu_run(name))
        if "| `sd2-" in row
    ]
    fast, eager, compiled, original, _ = rows
    assert readme_row("one NVIDIA H200") == [fast, compiled, eager, original]


def gpu_run(name):
    return measured_tables.FOLDER / f"h200_sd2{'_' * bool(name)}{name}.json"


def test_the_docs_state_the_measured_ratios_to_diffusers_on_a_gpu():
    run = json.loads(gpu_run("peers").read_text(encoding="utf-8"))
    fast, eager, compiled = (made["stats"]["median"] for made in run["benchmarks"])
    words = f"takes {compiled / fast:.2f} times as long as `fast`, and eager {eager / fast:.2f} times"
    assert words in (ROOT / "docs" / "h200.md").read_text(encoding="utf-8")


def test_measured_tables_are_those_of_their_files():
    """`python tests/helpers/measured_tables.py` writes them."""
    pages = [path for path in DOCUMENTS if measured_tables.PLACE.search(path.read_text(encoding="utf-8"))]
    assert pages
    for path in pages:
        page = path.read_text(encoding="utf-8")
        assert page == measured_tables.rewritten(page), path


def test_extras_match_the_documents():
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8").partition("## Extras")[2].partition("## ")[0]
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    assert set(re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)) == set(project["optional-dependencies"])
    assert "version" not in project and project["dynamic"] == ["version"]


def test_a_first_run_without_results_is_a_row_of_its_table(tmp_path):
    speedup = {"estimate": 1.5, "low": 1.4, "high": 1.6}
    usable = {"status": 0, "seconds": 120, "invalid": None, "drifted": None, "stack": {"device": "cpu"}}
    usable["speedups"] = {"a": speedup}
    killed = {"status": -9, "seconds": 7, "invalid": None, "drifted": None, "stack": None, "speedups": {}}
    path = tmp_path / "runs.json"
    path.write_text(json.dumps({"first_runs": [killed, usable]}), encoding="utf-8")
    assert measured_tables.table(path)[2:] == [
        "| 1 | -9 | 7 | none | no result |",
        "| 2 | 0 | 120 | 1.50x [1.40, 1.60] | valid |",
    ]
