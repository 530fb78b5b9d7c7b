"""Images of the embedded model, for a test that runs this file under another torch: python draw.py FOLDER.

Reads latents.npy [B, 4, 8, 8] float32 from the folder; writes a uint8 array [B, 64, 64, 3] for each of CASES to
images.npz, and prints the torch version.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from sd import Optimisations, StableDiffusion

PROMPT, SEED = "a red star on a blue background", 7
CASES = {
    f"{sampler}-{attention}": (sampler, attention)
    for attention in ("original", "mha")
    for sampler in ("ddim", "plms", "dpm_solver", "euler")
}


def draw(latents: np.ndarray) -> dict[str, np.ndarray]:
    """Images from those latents by case, and under `seed` the images from a seed alone."""
    model = StableDiffusion.tiny()
    options = {"steps": 8, "scale": 4.0, "seed": SEED, "batch": len(latents)}
    images = {}
    for name, (sampler, attention) in CASES.items():
        model.optimise(Optimisations(attention=attention))
        images[name] = model.txt2img(PROMPT, sampler=sampler, latents=torch.from_numpy(latents), **options).images
    images["seed"] = model.txt2img(PROMPT, sampler="ddim", **options).images
    return {name: tensor.numpy() for name, tensor in images.items()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    np.savez(folder / "images.npz", **draw(np.load(folder / "latents.npy")))
    print(torch.__version__)
