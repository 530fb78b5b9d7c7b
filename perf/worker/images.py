"""Is the picture of a timed round still right? A wrong picture has no time.

A round's output is compared with the reference: the same weights and latents in fp32 through the `original` attention,
eager, one image at a time. References are kept by content (`reference_key`) and made once. The rules at the end are pure.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os

IDENTICAL_DB = 100.0  # stands for the infinite PSNR of equal pictures, which JSON cannot hold


def examine(output, references: list[str] | None) -> dict:
    """What can be said about an output: hash, finiteness, constancy, and its distance from the references, one per image.

    Runs in a worker, on tensors. The relative error is the worst image's, in the Euclidean norm of its latents.
    """
    latents = output.latents.detach().float().cpu().contiguous()
    pictures = latents if output.images is None else output.images.contiguous()
    found = {
        "sha256": hashlib.sha256(pictures.numpy().tobytes()).hexdigest(),
        "finite": bool(latents.isfinite().all()),
        "constant": any(bool((picture == picture.flatten()[0]).all()) for picture in pictures),
        "latent_relative_error": None,
        "psnr_db": None,
    }
    if references:
        import numpy

        errors, ratios = [], []
        for i, path in enumerate(references):
            expected, picture = _read(numpy, path)
            difference = numpy.linalg.norm(latents[i].numpy() - expected)
            errors.append(float(difference / max(numpy.linalg.norm(expected), 1e-30)))
            if output.images is not None:
                ratios.append(_psnr(numpy, output.images[i].numpy(), picture))
        found["latent_relative_error"] = _finite(max(errors))
        found["psnr_db"] = min(ratios) if ratios else None
    return found


def _read(numpy, path: str):
    """(latents, picture or None) of a reference."""
    try:
        with numpy.load(path, allow_pickle=False) as reference:
            return reference["latents"], reference["image"] if "image" in reference.files else None
    except Exception as error:  # whatever numpy's readers meet in a damaged file, MemoryError too
        words = (
            f"{path} is no reference picture ({str(error) or type(error).__name__}): delete it, and it is made again"
        )
        raise ValueError(words) from None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _psnr(numpy, picture, expected) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures in dB."""
    error = float(numpy.mean((picture.astype("float64") - expected.astype("float64")) ** 2))
    return IDENTICAL_DB if error == 0 else min(IDENTICAL_DB, 10 * math.log10(255**2 / error))


def write(output, path: str) -> None:
    """Keep the single image of a reference run; whole or not at all."""
    import numpy

    arrays = {"latents": output.latents[0].detach().float().cpu().numpy()}
    if output.images is not None:
        arrays["image"] = output.images[0].numpy()
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            numpy.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


# --- what a reference is called


# --- rules
