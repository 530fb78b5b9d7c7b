"""Tests of the rules of SECURITY.md: untrusted data is never executed, always escaped, and confined to its folder."""

from __future__ import annotations

import ast
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from saved_runs import DOCUMENT, document, store

from perf.report import images, results, summary
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
    "shell": ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"),
    "process replacement": (
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
    "YAML with objects": (
        "yaml.load",
        "yaml.load_all",
        "yaml.unsafe_load",
        "yaml.full_load",
        "yaml.unsafe_load_all",
    ),
    "predictable names": ("tempfile.mktemp", "os.tempnam", "os.tmpnam"),
    "file modes": ("os.umask",),
    "archives that choose paths": ("tarfile.open", "shutil.unpack_archive", "zipfile.ZipFile.extractall"),
    "network": (
        *("urllib.request.urlopen", "requests.get", "requests.post", "socket.socket", "socket.create_connection"),
        *("http.client.HTTPSConnection", "torch.hub.load", "huggingface_hub.snapshot_download", "webbrowser.open"),
    ),
    "weak hash": ("hashlib.md5", "hashlib.sha1"),
}


def name_of(node: ast.expr) -> str:
    """Dotted name of a called expression, such as `subprocess.run`; empty for other expressions."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def imported_names(tree: ast.Module) -> dict[str, str]:
    """Full names of local names: `import numpy as np`, `from subprocess import run`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(
                {
                    alias.asname or alias.name.partition(".")[0]: alias.name if alias.asname else ""
                    for alias in node.names
                }
            )
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return {local: full for local, full in names.items() if full}


def findings(source: str) -> list[str]:
    """Violations of the rules in a module, with line numbers."""
    tree = ast.parse(source)
    names, violations = imported_names(tree), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        local = name_of(node.func)
        first, dot, rest = local.partition(".")
        called = names.get(first, first) + dot + rest
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        for rule, forbidden in FORBIDDEN.items():
            if called in forbidden:
                violations.append(f"line {node.lineno}: {called}: {rule}")
        if called in STARTERS:
            command = node.args[0] if node.args else keywords.get("args")
            if isinstance(command, (ast.Constant, ast.JoinedStr)) or (
                isinstance(command, ast.BinOp) and isinstance(command.op, (ast.Mod,))
            ):
                violations.append(f"line {node.lineno}: {called}: takes a text, not a list")
            if "shell" in keywords:
                violations.append(f"line {node.lineno}: {called}: shell=")
        if called == "torch.load" and not _is(keywords.get("weights_only"), True):
            violations.append(f"line {node.lineno}: torch.load without weights_only=True executes the file")
        if called in ("numpy.load", "np.load") and not _is(keywords.get("allow_pickle"), False):
            violations.append(f"line {node.lineno}: numpy.load without allow_pickle=False executes the file")
        if called.rpartition(".")[2] in ("extractall", "extract") and "archive" in called:
            violations.append(f"line {node.lineno}: {called}: an archive decides where its files go")
    return violations


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.slow
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_follow_the_rules(path):
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
def test_rules_detect_violations(line):
    assert len(findings(line)) >= 1


def test_rules_allow_safe_calls():
    allowed = (
        "import subprocess, torch, numpy, yaml\nsubprocess.run(['ls', name])\ntorch.load(p, weights_only=True)\n"
        "numpy.load(p, allow_pickle=False)\nmodel.eval()\ntorch.compile(model)\nyaml.parse(text)"
    )
    assert findings(allowed) == []


# --- paths from JSON


ESCAPING_PATHS = (
    "../../secret",
    "/etc/passwd",
    "..",
    "a/../../secret",
    "..\\secret",
    "~/secret",
    "%2e%2e/secret",
    "\x00x",
)


@pytest.mark.parametrize("name", ESCAPING_PATHS)
def test_names_become_file_names(name):
    for made in (file_name(name), lock.file_name(name), storage_name({"name": name})):
        assert (
            made and "/" not in made and "\\" not in made and "\x00" not in made and made.strip(".") and made[0] != "~"
        )


@pytest.mark.parametrize("name", [name for name in ESCAPING_PATHS if name.isprintable()])
def test_images_are_searched_only_beside_their_run(tmp_path, name, monkeypatch):
    """Names of configurations and references in a saved run do not select other folders."""
    run = document()
    for benchmark in run["benchmarks"][:1]:
        benchmark["extra_info"]["configuration"]["id"] = name
        benchmark["extra_info"]["image"]["reference"] = name
    (tmp_path / "runs").mkdir()
    _, found = results.read_session(store(tmp_path / "runs", run))
    checked = []
    monkeypatch.setattr(Path, "is_file", lambda path: checked.append(path) or False)
    for id in (found[0].id, found[0].image_reference):
        assert images._path(found[0], id, tmp_path / "more") is None
    assert len(checked) == 6
    for path in checked:
        folder = Path(os.path.normpath(path.parent))
        assert Path(os.path.normpath(path)).parent == folder
        assert folder in (
            tmp_path / "more",
            tmp_path / "runs" / "pictures",
            tmp_path / "runs" / "0001_nightly_pictures",
        )


# --- foreign text in summaries and terminals


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
def test_summary_escapes_foreign_text(tmp_path, text):
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
def test_markdown_escapes_every_special_character(text):
    made = markdown(text)
    assert "<" not in made and ">" not in made and "@e" not in made and "://" not in made
    for sign in "`*_[]()#!|":
        assert made.count(sign) == made.count(f"\\{sign}"), (sign, made)


def test_terminal_control_characters_are_escaped(capsys, monkeypatch):
    message = "x.ckpt: holds \x1b]0;owned\x07\x1b[2J\u202e and \udcff"
    quoted = r"x.ckpt: holds \x1b]0;owned\x07\x1b[2J\u202e and \udcff"
    assert printable(message) == quoted and printable("é ü 漢") == "é ü 漢"

    def refuse(*_, **__):
        raise CheckpointError(message)

    assert cli.guarded(refuse) == 2
    monkeypatch.setattr(convert, "convert", refuse)
    assert convert.main(["a", "b", "--to", "original"]) == 2
    monkeypatch.setattr(convert, "convert", lambda *_, **__: ["callbacks\x1b[2J"])
    monkeypatch.setattr("sd.checkpoint.contents.summary", lambda _: ["other entries: \x1b[2J"])
    assert convert.main(["a", "b", "--to", "original"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["b", r"  other entries: \x1b[2J"]
    assert err.splitlines() == [
        f"error: {quoted}",
        quoted,
        r"left out, which this layout cannot hold: callbacks\x1b[2J",
    ]


# --- temporary files


def test_temporary_folders_are_private(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = os.umask(0)  # the least private
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
def test_converted_weights_respect_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_safetensors(tmp_path / "x.safetensors", {"x": torch.zeros(3)}, {"format": "pt"})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == mode


def test_hostile_saved_run_is_quoted_in_commands(tmp_path):
    """Values with the syntax of options and commands."""
    run = json.loads(json.dumps(DOCUMENT))
    run["benchmarks"][0]["extra_info"]["configuration"].update(id="$(touch harmed); --x", checkpoint="`touch harmed`")
    _, found = results.read_session(store(tmp_path, run))
    line = command(found[0])
    assert "'`touch harmed`'" in line  # quoted for a shell
