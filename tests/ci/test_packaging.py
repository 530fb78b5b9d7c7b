"""The package outside of its repository: built, installed and used as a stranger would."""

from __future__ import annotations

import email
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from documents import ROOT

import sd

BUILT = ("sd", "perf", "tests", "docs", "constraints", "conftest.py", "pyproject.toml", "tox.ini", "MANIFEST.in")
BUILT += ("README.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE")
LARGEST_BYTES = 15_000_000
BACKEND = "import sys, setuptools.build_meta as made; print(getattr(made, sys.argv[1])(sys.argv[2]))"
pytestmark = pytest.mark.slow


def run(command, cwd: Path, **variables: str) -> str:
    """What a command prints; it must end well. Nothing of this session's Python path is seen by it."""
    left_out = (
        "PYTHONPATH",
        "PYTHONDONTWRITEBYTECODE",
        "PYTEST_ADDOPTS",
        "PYTEST_CURRENT_TEST",
        "PIP_REQUIRE_VIRTUALENV",
    )
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**environment, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
    return done.stdout


def build(source: Path, kind: str, output: Path) -> Path:
    """By the backend itself, as every front end calls it; `build` and pip would first want a network."""
    output.mkdir(exist_ok=True)
    name = run([sys.executable, "-c", BACKEND, f"build_{kind}", output], source).splitlines()[-1]
    return output / name


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(sdist, wheel made from it), of a copy of the repository."""
    setuptools = pytest.importorskip("setuptools", reason="the extra `test` brings setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"pyproject.toml needs setuptools 77, this is {setuptools.__version__}")
    import shutil

    folder = tmp_path_factory.mktemp("package")
    copy = folder / "copy"
    copy.mkdir()
    for name in BUILT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, copy / name)
    sdist = build(copy, "sdist", folder / "dist")
    with tarfile.open(sdist) as archive:
        for member in archive:
            assert not member.name.startswith(("/", "..")) and (member.isfile() or member.isdir())
        archive.extractall(folder / "unpacked")  # of our own making, a line ago
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, build(unpacked, "wheel", folder / "dist")


def test_what_the_wheel_holds(built):
    _, wheel = built
    assert wheel.stat().st_size < LARGEST_BYTES
    assert wheel.name == f"sd_perf-{sd.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        told = email.message_from_bytes(archive.read(metadata))
    wanted = {
        *(path.relative_to(ROOT).as_posix() for folder in ("sd", "perf") for path in (ROOT / folder).rglob("*.py")),
        *(path.relative_to(ROOT).as_posix() for path in (ROOT / "sd" / "config").glob("*.yaml")),
        *(path.relative_to(ROOT).as_posix() for path in (ROOT / "perf" / "published").iterdir()),
        *("sd/py.typed", "perf/py.typed", "sd/tiny/tiny.safetensors", "perf/report/page.css", "perf/report/page.js"),
    }
    assert wanted <= names
    others = {name for name in names - wanted if ".dist-info/" not in name}
    assert others == set(), "tests, documents and leftovers stay outside"
    assert told["Version"] == sd.__version__ and told["Requires-Python"] == ">=3.10"
    classifiers = told.get_all("Classifier")
    assert {"Typing :: Typed", "Framework :: Pytest"} <= set(classifiers)
    assert set(told.get_all("Provides-Extra")) >= {"test", "report", "xformers", "peers", "quant", "gpu", "dev"}
    assert "# sd-perf" in told.get_payload()


def test_what_the_sdist_holds(built):
    sdist, _ = built
    assert sdist.stat().st_size < LARGEST_BYTES
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"conftest.py", "tox.ini", "SECURITY.md", "docs/fleet/task.sh", "tests/helpers/saved_runs.py"} <= names
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("*.py")} <= names
    assert not [name for name in names if name.endswith(".pyc")]


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The bin folder of a fresh environment: the wheel, and by a .pth file what this one has beside it."""
    folder = tmp_path_factory.mktemp("environment")
    try:
        run([sys.executable, "-m", "venv", folder / "venv"], folder)
    except AssertionError as error:
        pytest.skip(f"no environment with pip can be made here: {str(error)[-200:]}")
    programs = folder / "venv" / "bin"
    run([programs / "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check", built[1]], folder)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    shared = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "shared.pth").write_text("".join(f"{path}\n" for path in shared))
    return programs


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder that is not the repository."""
    (tmp_path / "somewhere").mkdir()
    return tmp_path / "somewhere"


def test_it_is_the_installed_one_and_knows_its_version(installed, elsewhere):
    code = "import sd, perf, importlib.metadata as m; print(sd.__file__, perf.__file__, m.version('sd-perf'), sd.__version__)"
    *files, version, own = run([installed / "python", "-c", code], elsewhere).split()
    assert all(Path(file).is_relative_to(installed.parent) for file in files)
    assert version == own == sd.__version__
    assert run([installed / "sd-perf", "--version"], elsewhere) == f"sd-perf {sd.__version__}\n"


def test_pictures_by_the_embedded_model_and_a_packaged_config(installed, elsewhere):
    assert "--prompt" in run([installed / "txt2img", "--help"], elsewhere)
    made = run([installed / "txt2img", "--prompt", "a red star", "--steps", "2", "--outdir", "out"], elsewhere)
    assert (elsewhere / "out" / "samples" / "00000.png").read_bytes().startswith(b"\x89PNG"), made
    code = (
        "from sd.pipeline import resolve_config; from sd.config.yaml_reader import CONFIGS\n"
        "print(sorted(resolve_config(path).name for path in CONFIGS.glob('*.yaml')))"
    )
    assert "v2-inference" in run([installed / "python", "-c", code], elsewhere)


def test_the_suite_examines_collects_merges_and_reports(installed, elsewhere):
    told = run([installed / "sd-perf", "doctor", "--no-compile", "--json", "--device", "cpu"], elsewhere)
    checks = {one["name"]: one for one in json.loads(told)["checks"]}
    assert checks["torch"]["status"] == "ok" and checks["pytest-benchmark"]["status"] == "ok"
    listed = run(
        [
            installed / "python",
            "-m",
            "pytest",
            "-p",
            "perf.plugin",
            "--pyargs",
            "perf.test_txt2img",
            "--collect-only",
            "-q",
        ],
        elsewhere,
    )
    assert "test_txt2img[" in listed
    golden = ROOT / "tests" / "runs" / "0001_synthetic.json"
    run([installed / "sd-perf", "merge", golden, "--output", "all"], elsewhere)
    run([installed / "sd-perf", "report", "all", "--summary", "summary.md"], elsewhere)
    assert (elsewhere / "summary.md").read_text(encoding="utf-8").startswith("## perf")


def test_every_console_script_is_there(installed):
    wanted = {"txt2img", "img2img", "sd-convert", "sd-perf"}
    assert wanted <= {path.name for path in installed.iterdir()}
    try:
        own = importlib.metadata.distribution("sd-perf")
    except importlib.metadata.PackageNotFoundError:
        return
    assert {one.name for one in own.entry_points if one.group == "console_scripts"} <= wanted
