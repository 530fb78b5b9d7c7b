"""What a process that draws a picture does not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
import torch  # some releases bring a little of their compiler by themselves
there = set(sys.modules)
from sd import StableDiffusion
StableDiffusion.tiny().txt2img("a", steps=2, sampler="ddim")
new = set(sys.modules) - there
print([name for name in ("torch._dynamo", "torch._inductor", "open_clip", "torchvision") if name in new])
"""


def test_no_compiler_and_no_vision_library():
    """Each of them costs seconds of every process, and none is needed for an uncompiled picture."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
