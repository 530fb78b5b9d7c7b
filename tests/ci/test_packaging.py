"""Tests of the package outside its repository: build, install and use it."""

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
from documents import ROOT, SOURCES

import sd

BUILT = (*SOURCES, "tox.ini", "MANIFEST.in", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", ".github")
LARGEST_BYTES = 15_000_000
BACKEND = "import sys, setuptools.build_meta as made; print(getattr(made, sys.argv[1])(sys.argv[2]))"
pytestmark = pytest.mark.slow


def run(command, cwd: Path, **variables: str) -> str:
    """Run a command without the Python path of this session, and return its output. It must succeed."""
    removed = (
        "PYTHONPATH",
        "PYTHONDONTWRITEBYTECODE",
        "PYTEST_ADDOPTS",
        "PYTEST_CURRENT_TEST",
        "PIP_REQUIRE_VIRTUALENV",
    )
    environment = {name: value for name, value in os.environ.items() if name not in removed}
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


def build(source: Path, target: str, output: Path) -> Path:
    """Build with the backend itself, because front ends need a network."""
    output.mkdir(exist_ok=True)
    name = run([sys.executable, "-c", BACKEND, f"build_{target}", output], source).splitlines()[-1]
    return output / name


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(sdist, wheel built from it) of a copy of the repository."""
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
        archive.extractall(folder / "unpacked")  # built above
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, build(unpacked, "wheel", folder / "dist")


@pytest.mark.slow
def test_contents_of_the_wheel(built):
    _, wheel = built
    assert wheel.stat().st_size < LARGEST_BYTES
    assert wheel.name == f"sd_perf-{sd.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        headers = email.message_from_bytes(archive.read(metadata))
    expected = {
        *(path.relative_to(ROOT).as_posix() for folder in ("sd", "perf") for path in (ROOT / folder).rglob("*.py")),
        *(path.relative_to(ROOT).as_posix() for path in (ROOT / "sd" / "config").glob("*.yaml")),
        *(path.relative_to(ROOT).as_posix() for path in (ROOT / "sd").rglob("*.cpp")),
        *(path.relative_to(ROOT).as_posix() for path in (ROOT / "perf" / "published").iterdir()),
        *(path.relative_to(ROOT).as_posix() for path in (ROOT / "perf" / "report").glob("page.*")),
        *("sd/py.typed", "perf/py.typed", "sd/tiny/tiny.safetensors", "sd/tiny/tiny-inpaint.safetensors"),
    }
    assert expected <= names
    others = {name for name in names - expected if ".dist-info/" not in name}
    assert others == set(), "the wheel has no tests, documents or build files"
    assert headers["Version"] == sd.__version__ and headers["Requires-Python"] == ">=3.10"
    classifiers = headers.get_all("Classifier")
    assert {"Typing :: Typed", "Framework :: Pytest"} <= set(classifiers)
    assert set(headers.get_all("Provides-Extra")) >= {"test", "report", "xformers", "peers", "quant", "gpu", "dev"}
    assert "# sd-perf" in headers.get_payload()


def test_contents_of_the_sdist(built):
    sdist, _ = built
    assert sdist.stat().st_size < LARGEST_BYTES
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"conftest.py", "tox.ini", "SECURITY.md", "docs/fleet/task.sh", "tests/helpers/saved_runs.py"} <= names
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")} <= names
    assert not [name for name in names if name.endswith(".pyc")]


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The bin folder of a new environment with the wheel, and with this environment's packages through a .pth file."""
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
    """A folder outside the repository."""
    (tmp_path / "somewhere").mkdir()
    return tmp_path / "somewhere"


@pytest.mark.slow
def test_installed_package_and_its_version(installed, elsewhere):
    code = "import sd, perf, importlib.metadata as m; print(sd.__file__, perf.__file__, m.version('sd-perf'), sd.__version__)"
    *files, version, own = run([installed / "python", "-c", code], elsewhere).split()
    assert all(Path(file).is_relative_to(installed.parent) for file in files)
    assert version == own == sd.__version__
    assert run([installed / "sd-perf", "--version"], elsewhere) == f"sd-perf {sd.__version__}\n"


@pytest.mark.slow
def test_embedded_model_and_packaged_configs(installed, elsewhere):
    assert "--prompt" in run([installed / "txt2img", "--help"], elsewhere)
    made = run([installed / "txt2img", "--prompt", "a red star", "--steps", "2", "--outdir", "out"], elsewhere)
    assert (elsewhere / "out" / "samples" / "00000.png").read_bytes().startswith(b"\x89PNG"), made
    code = (
        "from sd.networks import resolve_config; from sd.config.yaml_reader import CONFIGS\n"
        "print(sorted(resolve_config(path).name for path in CONFIGS.glob('*.yaml')))"
    )
    assert "v2-inference" in run([installed / "python", "-c", code], elsewhere)


@pytest.mark.slow
def test_commands_of_the_suite(installed, elsewhere):
    answer = run([installed / "sd-perf", "doctor", "--no-compile", "--json", "--device", "cpu"], elsewhere)
    checks = {check["name"]: check for check in json.loads(answer)["checks"]}
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


@pytest.mark.nightly
def test_plugin_of_the_installed_package(installed, elsewhere):
    """The entry point gives a suite `measured`, and no option without our prefix."""
    (elsewhere / "test_mine.py").write_text("def test_mine(measured):\n    assert measured(sum, [1, 2]) == 3\n")
    pytest_command = [installed / "python", "-m", "pytest"]
    options = run([*pytest_command, "--help"], elsewhere)
    assert "--perf-model=" in options and " --model=" not in options
    out = run([*pytest_command, "--perf-launches=2", "--perf-rounds=1", "--benchmark-save=a"], elsewhere)
    assert "1 passed" in out and "test_mine.test_mine" in out
    (saved,) = elsewhere.rglob("0001_a.json")
    (benchmark,) = json.loads(saved.read_text())["benchmarks"]
    assert len(benchmark["extra_info"]["launches"]) == 2
    assert "published" in run([installed / "sd-perf", "list"], elsewhere)


def test_console_scripts_are_installed(installed):
    scripts = {"txt2img", "img2img", "inpaint", "depth2img", "sd-convert", "sd-perf"}
    assert scripts <= {path.name for path in installed.iterdir()}
    try:
        own = importlib.metadata.distribution("sd-perf")
    except importlib.metadata.PackageNotFoundError:
        return
    assert {entry.name for entry in own.entry_points if entry.group == "console_scripts"} <= scripts
