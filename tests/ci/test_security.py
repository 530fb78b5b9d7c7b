"""The rules of SECURITY.md, read off the source and tried: nothing untrusted is executed, escapes, or leaves its folder."""

from __future__ import annotations

import ast
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from saved_runs import DOCUMENT, document, store

from perf.report import pictures, results, summary
from perf.report.reproduce import command
from perf.report.text import file_name, markdown
from perf.runs.storage import storage_name
from perf.session import lock
from perf.session.workers import compile_cache
from sd import convert
from sd.checkpoint.file_formats import write_safetensors
from sd.cli import run as cli
from sd.errors import CheckpointError, printable

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("sd", "perf") for path in (ROOT / folder).rglob("*.py"))
STARTERS = ("subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call", "subprocess.check_output")
FORBIDDEN = {
    "a shell": ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"),
    "another program in our place": (
        "os.execv",
        "os.execve",
        "os.execvp",
        "os.execvpe",
        "os.execl",
        "os.execlp",
        "os.spawnv",
    ),
    "text as code": ("eval", "exec", "compile", "__import__", "runpy.run_path", "code.interact"),
    "a file as code": (
        *("pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.load", "dill.load", "joblib.load", "shelve.open"),
        *("marshal.load", "marshal.loads", "pandas.read_pickle", "torch.jit.load", "torch.package.PackageImporter"),
    ),
    "a YAML that makes objects": (
        "yaml.load",
        "yaml.load_all",
        "yaml.unsafe_load",
        "yaml.full_load",
        "yaml.unsafe_load_all",
    ),
    "names that others can guess": ("tempfile.mktemp", "os.tempnam", "os.tmpnam"),
    "files for everybody": ("os.umask",),
    "archives that say where they go": ("tarfile.open", "shutil.unpack_archive", "zipfile.ZipFile.extractall"),
    "the network": (
        *("urllib.request.urlopen", "requests.get", "requests.post", "socket.socket", "socket.create_connection"),
        *("http.client.HTTPSConnection", "torch.hub.load", "huggingface_hub.snapshot_download", "webbrowser.open"),
    ),
    "a broken hash": ("hashlib.md5", "hashlib.sha1"),
}


def name_of(node: ast.expr) -> str:
    """`subprocess.run` of what is called, whatever it was imported as; empty for what has no name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def imported_names(tree: ast.Module) -> dict[str, str]:
    """What local names stand for: `import numpy as np`, `from subprocess import run`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(
                {one.asname or one.name.partition(".")[0]: one.name if one.asname else "" for one in node.names}
            )
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({one.asname or one.name: f"{node.module}.{one.name}" for one in node.names})
    return {local: full for local, full in names.items() if full}


def findings(source: str) -> list[str]:
    """What in a module breaks the rules, each with its line."""
    tree = ast.parse(source)
    names, found = imported_names(tree), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        local = name_of(node.func)
        first, dot, rest = local.partition(".")
        called = names.get(first, first) + dot + rest
        given = {one.arg: one.value for one in node.keywords}
        for what, forbidden in FORBIDDEN.items():
            if called in forbidden:
                found.append(f"line {node.lineno}: {called}: {what}")
        if called in STARTERS:
            command = node.args[0] if node.args else given.get("args")
            if isinstance(command, (ast.Constant, ast.JoinedStr)) or (
                isinstance(command, ast.BinOp) and isinstance(command.op, (ast.Mod,))
            ):
                found.append(f"line {node.lineno}: {called}: takes a text, not a list")
            if "shell" in given:
                found.append(f"line {node.lineno}: {called}: shell=")
        if called == "torch.load" and not _is(given.get("weights_only"), True):
            found.append(f"line {node.lineno}: torch.load without weights_only=True executes the file")
        if called in ("numpy.load", "np.load") and not _is(given.get("allow_pickle"), False):
            found.append(f"line {node.lineno}: numpy.load without allow_pickle=False executes the file")
        if called.rpartition(".")[2] in ("extractall", "extract") and "archive" in called:
            found.append(f"line {node.lineno}: {called}: an archive decides where its files go")
    return found


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_breaks_the_rules(path):
    assert findings(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import subprocess\nsubprocess.run('ls ' + name, shell=True)",
        "import subprocess\nsubprocess.run(f'ls {name}')",
        "from subprocess import Popen\nPopen('ls %s' % name)",
        "import subprocess as s\ns.check_output(args='ls')",
        "import os\nos.system(name)",
        "import os as o\no.popen(name)",
        "eval(name)",
        "exec(name)",
        "import pickle\npickle.load(file)",
        "from pickle import loads as read\nread(data)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import numpy\nnumpy.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text, Loader=loader)",
        "from tempfile import mktemp\nmktemp()",
        "import hashlib\nhashlib.md5(data)",
        "import urllib.request\nurllib.request.urlopen(address)",
        "import zipfile\narchive = zipfile.ZipFile(path)\narchive.extractall(folder)",
    ],
)
def test_the_rules_find_what_they_forbid(line):
    assert len(findings(line)) >= 1


def test_the_rules_let_pass_what_is_meant():
    allowed = (
        "import subprocess, torch, numpy, yaml\nsubprocess.run(['ls', name])\ntorch.load(p, weights_only=True)\n"
        "numpy.load(p, allow_pickle=False)\nmodel.eval()\ntorch.compile(model)\nyaml.parse(text)"
    )
    assert findings(allowed) == []


# --- paths from JSON


LEADING_OUT = (
    "../../secret",
    "/etc/passwd",
    "..",
    "a/../../secret",
    "..\\secret",
    "~/secret",
    "%2e%2e/secret",
    "\x00x",
)


@pytest.mark.parametrize("name", LEADING_OUT)
def test_names_become_names_of_files(name):
    for made in (file_name(name), lock.file_name(name), storage_name({"name": name})):
        assert (
            made and "/" not in made and "\\" not in made and "\x00" not in made and made.strip(".") and made[0] != "~"
        )


@pytest.mark.parametrize("name", [one for one in LEADING_OUT if one.isprintable()])
def test_a_picture_is_only_looked_for_beside_its_run(tmp_path, name, monkeypatch):
    """Whatever a saved run calls its configuration or its reference."""
    run = document()
    for benchmark in run["benchmarks"][:1]:
        benchmark["extra_info"]["configuration"]["id"] = name
        benchmark["extra_info"]["image"]["reference"] = name
    (tmp_path / "runs").mkdir()
    _, found = results.read_session(store(tmp_path / "runs", run))
    asked = []
    monkeypatch.setattr(Path, "is_file", lambda path: asked.append(path) or False)
    for id in (found[0].id, found[0].image_reference):
        assert pictures._path(found[0], id, tmp_path / "more") is None
    assert len(asked) == 6
    for path in asked:
        folder = Path(os.path.normpath(path.parent))
        assert Path(os.path.normpath(path)).parent == folder
        assert folder in (
            tmp_path / "more",
            tmp_path / "runs" / "pictures",
            tmp_path / "runs" / "0001_nightly_pictures",
        )


# --- what a saved run, a checkpoint or a file name says, where somebody reads it


HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![track](https://example.invalid/x.png)",
    "| cell | of | its | own |",
    "@everyone",
    "`code` **bold** # title",
    "a\\|b",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_summary_quotes_and_does_not_obey(tmp_path, text):
    run = document()
    run["machine_info"]["stack"]["name"] = run["perf"]["partial"] = run["commit_info"]["id"] = text
    run["benchmarks"][0]["extra_info"]["configuration"].update(id=text, attention=text)
    session, found = results.read_session(store(tmp_path, run, label="x"))
    made = summary.markdown_summary([session], found, [f"{text}: is not JSON"])
    assert text not in made
    assert markdown(text) in made
    for sign in ("<script", "<img", "](", "@everyone", "https://"):
        assert sign not in made, sign


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_of_a_text_has_no_sign_left_that_does_something(text):
    made = markdown(text)
    assert "<" not in made and ">" not in made and "@e" not in made and "://" not in made
    for sign in "`*_[]()#!|":
        assert made.count(sign) == made.count(f"\\{sign}"), (sign, made)


def test_a_terminal_is_told_and_not_commanded(capsys, monkeypatch):
    said = "x.ckpt: holds \x1b]0;owned\x07\x1b[2J\u202e and \udcff"
    quoted = r"x.ckpt: holds \x1b]0;owned\x07\x1b[2J\u202e and \udcff"
    assert printable(said) == quoted and printable("é ü 漢") == "é ü 漢"

    def refuse(*_, **__):
        raise CheckpointError(said)

    assert cli.guarded(refuse) == 2
    monkeypatch.setattr(convert, "convert", refuse)
    assert convert.main(["a", "b", "--to", "original"]) == 2
    monkeypatch.setattr(convert, "convert", lambda *_: ["callbacks\x1b[2J"])
    assert convert.main(["a", "b", "--to", "original"]) == 0
    err = capsys.readouterr().err
    assert err.splitlines() == [
        f"error: {quoted}",
        quoted,
        r"left out, which this layout cannot hold: callbacks\x1b[2J",
    ]


# --- temporary files


def test_temporary_folders_are_private(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = os.umask(0)  # the most careless there is
    try:
        with compile_cache() as folder:
            assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        assert not os.path.exists(folder)
        with lock.DeviceLock("cpu", tmp_path / "locks") as held:
            assert stat.S_IMODE(held.path.stat().st_mode) == 0o600
            assert stat.S_IMODE(held.folder.stat().st_mode) == 0o700
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_converted_weights_are_as_private_as_the_umask_says(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_safetensors(tmp_path / "x.safetensors", {"x": torch.zeros(3)}, {"format": "pt"})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == mode


def test_a_saved_run_that_means_harm_is_data_in_every_command(tmp_path):
    """Values that would be options, commands or patterns, were they taken for one."""
    run = json.loads(json.dumps(DOCUMENT))
    run["benchmarks"][0]["extra_info"]["configuration"].update(id="$(touch harmed); --x", checkpoint="`touch harmed`")
    _, found = results.read_session(store(tmp_path, run))
    line = command(found[0])
    assert "'`touch harmed`'" in line  # quoted, for whoever pastes it into a shell
