"""Outputs of the embedded model that no refactoring may change: how they are made, and where they are stored.

    python tests/helpers/held_outputs.py        # add this machine's hashes to tests/held/outputs.json

The latents are compared everywhere within a tolerance. The hashes are compared bit for bit, on the machines that have
stored theirs: arithmetic on a CPU depends on the torch version and on the instructions of the processor.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sd import Optimisations, StableDiffusion

FOLDER = Path(__file__).parents[1] / "held"
HASHES, LATENTS = FOLDER / "outputs.json", FOLDER / "latents.safetensors"
PROMPT = "a red circle on a blue background"
ORIGINAL = Optimisations(attention="original", original_steps=True)
# Name -> (optimisations, arguments of txt2img)
CASES = {
    **{sampler: (Optimisations(), {"sampler": sampler}) for sampler in ("ddim", "plms", "dpm_solver", "euler")},
    "ddim-eta": (Optimisations(), {"sampler": "ddim", "eta": 1.0}),
    "ddim-original-steps": (ORIGINAL, {"sampler": "ddim"}),
    "plms-original-steps": (ORIGINAL, {"sampler": "plms"}),
    "euler-unguided": (Optimisations(), {"sampler": "euler", "scale": 1.0}),
}


def machine_key() -> str:
    """The torch version and the processor, as the hashes depend on both."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = [re.search(rf"^{name}\s*: (.+)$", cpuinfo, re.M) for name in ("vendor_id", "cpu family", "model")]
    processor = "-".join(match[1] for match in fields if match) or "unknown"
    return f"torch {torch.__version__.split('+')[0]} on {processor}"


def make(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 images [2, 64, 64, 3], float32 latents [2, 4, 8, 8]) of one case, computed on one thread."""
    optimisations, arguments = CASES[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = StableDiffusion.tiny(optimisations=optimisations).txt2img(
            PROMPT, steps=6, seed=7, batch=2, **arguments
        )
    finally:
        torch.set_num_threads(threads)
    return result.images, result.latents


def sha256(tensor: torch.Tensor) -> str:
    """Hash of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def main() -> None:
    """Store this machine's hashes, and the latents where there are none yet."""
    FOLDER.mkdir(exist_ok=True)
    outputs = {name: make(name) for name in CASES}
    stored = json.loads(HASHES.read_text()) if HASHES.exists() else {}
    stored[machine_key()] = {
        name: {"images": sha256(images), "latents": sha256(latents)} for name, (images, latents) in outputs.items()
    }
    HASHES.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    if not LATENTS.exists():
        save_file({name: latents for name, (_, latents) in outputs.items()}, str(LATENTS))
    errors = {
        name: float((latents - load_file(str(LATENTS))[name]).abs().max()) for name, (_, latents) in outputs.items()
    }
    print(machine_key(), errors)


if __name__ == "__main__":
    sys.exit(main())
