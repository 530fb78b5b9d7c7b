"""Modules that an image without compilation must not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
import torch  # some releases import part of their compiler themselves
before = set(sys.modules)
from sd import StableDiffusion
StableDiffusion.tiny().txt2img("a", steps=2, sampler="ddim")
new = set(sys.modules) - before
print([name for name in ("torch._dynamo", "torch._inductor", "triton", "open_clip", "torchvision") if name in new])
"""


@pytest.mark.slow
def test_no_compiler_no_triton_and_no_vision_library():
    """Each of them takes seconds in every process."""
    root = Path(__file__).parents[2]
    process = subprocess.run([sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
