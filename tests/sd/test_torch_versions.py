"""The same checkpoint, latents and seed give the same image on torch 1.12 and on this torch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import SEED
from draw import CASES, draw

ROOT = Path(__file__).parents[2]


def python_of_torch112() -> Path:
    """SD_PERF_TORCH112_PYTHON, which must exist if set, or the interpreter of `tox run -e torch112`."""
    if torch.__version__.startswith("1.12."):
        pytest.skip("this is torch 1.12 itself")
    named = os.environ.get("SD_PERF_TORCH112_PYTHON")
    python = Path(named) if named else ROOT / ".tox/torch112/bin/python"
    if not python.exists():
        assert not named, f"SD_PERF_TORCH112_PYTHON={named} does not exist"
        pytest.skip("torch 1.12 is not installed: run `tox run -e torch112 --notest` or set SD_PERF_TORCH112_PYTHON")
    return python


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Images of torch 1.12 and of this torch from the same latents, which are new in every run."""
    python, folder = python_of_torch112(), tmp_path_factory.mktemp("torch112")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(SEED)).numpy()
    np.save(folder / "latents.npy", latents)
    command = [str(python), "-W", "ignore", str(ROOT / "tests" / "helpers" / "draw.py"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1].startswith("1.12.")
    with np.load(folder / "images.npz") as theirs:
        return dict(theirs), draw(latents)


@pytest.mark.parametrize("name", [*CASES, "seed"])
def test_the_same_image(seed, both, name):
    theirs, ours = (images[name].astype(int) for images in both)
    difference = np.abs(theirs - ours)
    print(f"{name}: at most {difference.max()}/255 at {np.count_nonzero(difference)} of {difference.size} values")
    assert ours.shape == theirs.shape == (2, 64, 64, 3)
    assert ours.std() > 5  # not a constant colour
    assert difference.max() <= 2
