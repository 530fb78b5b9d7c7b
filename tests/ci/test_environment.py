"""Is the environment the one that its name promises? A green `torch112` was once seen with torch 2.14 in it."""

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
    """The version that a constraints file names first, which is that of its newest Python."""
    return re.search(rf"^{package}==([^\s;]+)", constraints.read_text(), re.MULTILINE)[1]


def digits(version: str) -> str:
    """1.12.1 -> 112, as in the names of the environments."""
    return "".join(version.split(".")[:2])


def tox_settings(name: str) -> dict[str, str]:
    """One variable of [testenv] set_env, by environment."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini")
    return dict(re.findall(rf"^(torch\d+): {name} = (.+)$", parser["testenv"]["set_env"], re.MULTILINE))


def test_torch_is_the_expected_one():
    expected = os.environ.get("SD_PERF_EXPECT_TORCH")
    if expected is None:
        pytest.skip("SD_PERF_EXPECT_TORCH is not set: this is no environment of tox.ini")
    assert torch.__version__.split("+")[0] == expected


@pytest.mark.parametrize("constraints", CONSTRAINTS, ids=lambda path: path.stem)
def test_name_pin_and_expectation_agree(constraints):
    version = pin(constraints, "torch")
    assert f"torch{digits(version)}" == constraints.stem
    assert tox_settings("SD_PERF_EXPECT_TORCH")[constraints.stem] == version
    assert tox_settings("UV_CONSTRAINT")[constraints.stem].endswith(f"/constraints/{constraints.name}")


def test_every_environment_has_its_constraints():
    assert sorted(tox_settings("SD_PERF_EXPECT_TORCH")) == [path.stem for path in CONSTRAINTS]


def test_numpy_arrays_cross_into_torch_and_back():
    numpy = pytest.importorskip("numpy")  # torch 1.12 imports with numpy 2 and then fails at the first of these
    assert torch.from_numpy(numpy.arange(3)).numpy().tolist() == [0, 1, 2]


def test_the_nightly_workflow_runs_every_environment():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini")
    everything = re.search(r"^all-torch = (.+)$", parser["tox"]["labels"], re.MULTILINE)[1]
    workflow = (ROOT / ".github" / "workflows" / "nightly.yml").read_text()
    assert re.search(r"environment: \[(.+)\]", workflow)[1] == everything
