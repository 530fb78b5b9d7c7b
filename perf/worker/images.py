"""Compare the output of a round with its reference: hash, finite, constant, latent error, PSNR.

The reference is the output of the same weights and latents in fp32 with `original` attention, eager, one image at a
time. perf.session.image_check has the bounds and where references are stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from typing import Any

import numpy as np

from perf.worker.engines.interface import Output

IDENTICAL_DB = 100.0  # stands for the infinite PSNR of identical images, which JSON cannot hold


def examine(output: Output, references: list[str] | None) -> dict[str, Any]:
    """Properties of an output and its distance from the references, one file per image.

    latent_relative_error: of the worst image, in the Euclidean norm. psnr_db: of the worst image. Both are None without
    references. Raises ValueError for a damaged reference.
    """
    latents = output.latents.detach().float().cpu().contiguous()
    pixels = latents if output.images is None else output.images.contiguous()
    errors, ratios = [], []
    for i, path in enumerate(references or ()):
        expected_latents, expected_image = _read(path)
        own_latents = _like(latents, i, expected_latents)
        expected_latents = expected_latents.astype("float64")  # whose norm does not overflow
        norm = np.linalg.norm(own_latents - expected_latents)
        errors.append(float(norm / max(np.linalg.norm(expected_latents), 1e-30)))
        if output.images is not None:
            ratios.append(_psnr(_like(output.images, i, expected_image), expected_image))
    worst = max(errors, default=math.inf)
    return {
        "sha256": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
        "finite": bool(latents.isfinite().all()),
        "constant": output.varied and any(bool((image == image.flatten()[0]).all()) for image in pixels),
        "latent_relative_error": worst if math.isfinite(worst) else None,
        "psnr_db": min(ratios, default=None),
    }


def _like(batch: Any, i: int, expected: np.ndarray | None) -> np.ndarray:
    """Entry i of a batch, or all of it where the reference has all. Raises ValueError for a reference of another shape."""
    for array in (batch.numpy(), batch[i].numpy()):
        if expected is not None and array.shape == expected.shape:
            return array
    shape = None if expected is None else expected.shape
    raise ValueError(f"the output has the shape {tuple(batch.shape)}, and that of its reference is {shape}")


def _read(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(latents, image or None) of a reference file."""
    try:
        with np.load(path, allow_pickle=False) as reference:
            return reference["latents"], reference["image"] if "image" in reference.files else None
    except Exception as error:  # numpy raises many types for a damaged file, MemoryError among them
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is not a reference image ({reason}): delete it, and it is made again") from None


def _psnr(image: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 images, in dB."""
    error = float(np.mean((image.astype("float64") - expected.astype("float64")) ** 2))
    return IDENTICAL_DB if error == 0 else min(IDENTICAL_DB, 10 * math.log10(255**2 / error))


def write(output: Output, path: str, whole: bool = False) -> None:
    """Store the output of a reference run, atomically: its single image, or the `whole` of a user's engine."""
    arrays = {"latents": output.latents.detach().float().cpu().numpy()}
    if output.images is not None:
        arrays["image"] = output.images.numpy()
    if not whole:
        arrays = {name: array[0] for name, array in arrays.items()}
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
