"""Tests of the environment: torch has the pinned version. `torch112` once passed with torch 2.14."""

from __future__ import annotations

import configparser
import os
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CONSTRAINTS = sorted(path for path in (ROOT / "constraints").glob("torch*.txt"))


def pin(constraints: Path, package: str) -> str:
    """First version of a package in a constraints file, which is that of the newest Python."""
    return re.search(rf"^{package}==([^\s;]+)", constraints.read_text(), re.MULTILINE)[1]


def digits(version: str) -> str:
    """Digits in the name of an environment: 1.12.1 -> 112."""
    return "".join(version.split(".")[:2])


def tox_settings(name: str) -> dict[str, str]:
    """Values of a variable in [testenv] set_env, by environment."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini")
    return dict(re.findall(rf"^(torch\d+): {name} = (.+)$", parser["testenv"]["set_env"], re.MULTILINE))


def test_torch_has_the_expected_version():
    expected = os.environ.get("SD_PERF_EXPECT_TORCH")
    if expected is None:
        pytest.skip("SD_PERF_EXPECT_TORCH is not set: not an environment of tox.ini")
    assert torch.__version__.split("+")[0] == expected


@pytest.mark.parametrize("constraints", CONSTRAINTS, ids=lambda path: path.stem)
def test_name_pin_and_expected_version_agree(constraints):
    version = pin(constraints, "torch")
    assert f"torch{digits(version)}" == constraints.stem
    assert tox_settings("SD_PERF_EXPECT_TORCH")[constraints.stem] == version
    assert tox_settings("UV_CONSTRAINT")[constraints.stem].endswith(f"/constraints/{constraints.name}")


def test_every_environment_has_constraints():
    assert sorted(tox_settings("SD_PERF_EXPECT_TORCH")) == [path.stem for path in CONSTRAINTS]


def test_conversion_between_numpy_and_torch():
    numpy = pytest.importorskip("numpy")  # torch 1.12 imports with numpy 2 and then fails at these conversions
    assert torch.from_numpy(numpy.arange(3)).numpy().tolist() == [0, 1, 2]


def test_the_nightly_workflow_runs_every_environment():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini")
    environments = re.search(r"^all-torch = (.+)$", parser["tox"]["labels"], re.MULTILINE)[1]
    workflow = (ROOT / ".github" / "workflows" / "nightly.yml").read_text()
    assert re.search(r"environment: \[(.+)\]", workflow)[1] == environments


def test_paths_of_ci_run_exist():
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    paths = re.findall(r"(?:tests|\.github)/[\w./*-]+", text)
    assert len(paths) > 5
    for path in paths:
        assert list(ROOT.glob(path)), path
