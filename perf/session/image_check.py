"""Validate the first timed image of each launch against the fp32 reference; a failed check invalidates the timing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bounds:
    """The largest latent error and the lowest PSNR of a correct image, relative to the fp32 reference."""

    latent_relative_error: float
    psnr_db: float


# By computing dtype. Measured on the embedded model over 20 steps at guidance 7.5: fp32 5e-6 and 83 dB, fp16 0.008 and
# 52 dB, bf16 0.08 and 24 dB. The bounds leave a factor of 3 to 6, and for fp32 room for another torch or a compiler.
BOUNDS = {"fp32": Bounds(1e-3, 45.0), "fp16": Bounds(0.05, 35.0), "bf16": Bounds(0.25, 16.0)}
# Of losses and gradient norms of a training against those of fp32. Measured on the embedded model over 4 updates: fp32
# 8e-8, fp16 0.005, bf16 0.003. A wrong gradient changes the norms at once and the losses from the second update on.
TRAINING_BOUNDS = {"fp32": Bounds(1e-4, 0.0), "fp16": Bounds(0.03, 0.0), "bf16": Bounds(0.03, 0.0)}
# Approximate techniques change the image by intent, depending more on the prompt than on the technique: the embedded
# model's latents differ by up to 1.2 at guidance 7.5, where the same techniques keep 40 dB at 4.0
# (tests/sd/test_approximate.py has their bounds). Unrelated latents differ by 1.41, so that more is an error.
APPROXIMATE_BOUNDS = Bounds(1.41, 0.0)
EXACT_ERROR = 1e-4  # ten times the latent error of fp32 itself


def computing_type(precision: str, device: str) -> str:
    """The computing dtype of a precision: autocast is fp16 on CUDA, as published, and bf16 on a CPU."""
    if precision == "autocast":
        return "fp16" if device == "cuda" else "bf16"
    return "fp32" if precision == "full" else precision


def image_failure(
    image: dict[str, Any],
    precision: str,
    device: str,
    approximate: bool = False,
    workload: str = "txt2img",
    own: bool = False,
) -> str | None:
    """Why an image, or in the workload `train` a loss trace, fails the check, as `code: explanation`, or None.

    image: metrics as perf.worker.images.examine returns them. approximate: whether the technique changes the image by
    intent. An error of exactly 0 fails as well wherever the computation should differ from the reference, but not of an
    engine of the user's `own`, which may return a text.
    """
    if not image["finite"]:
        return "not_finite: the latents contain NaN or infinity; try precision full or bf16"
    if image["constant"]:
        return "constant: every pixel of the image has the same value"
    dtype = computing_type(precision, device)
    bounds = APPROXIMATE_BOUNDS if approximate else (TRAINING_BOUNDS if workload == "train" else BOUNDS)[dtype]
    error, psnr = image["latent_relative_error"], image["psnr_db"]
    if error is None:
        return None
    if error > bounds.latent_relative_error:
        limit = bounds.latent_relative_error
        output = "losses and gradient norms" if workload == "train" else "latents"
        return f"{output}: relative error {error:.2g} against the fp32 reference, at most {limit:g} allowed in {dtype}"
    if psnr is not None and psnr < bounds.psnr_db:
        return f"image: PSNR {psnr:.1f} dB against the fp32 reference, at least {bounds.psnr_db:g} required in {dtype}"
    if own:
        return None
    if dtype != "fp32" and error == 0:
        return f"suspiciously_equal: the latents of {precision} equal those of fp32, so it did not run in {precision}"
    if approximate and error < EXACT_ERROR:
        return f"suspiciously_equal: the latents differ by only {error:.2g}, so nothing was approximated"
    return None


def repeated_output(hashes: list[str]) -> str | None:
    """Why the output hashes of one launch are implausible, or None: different latents never give equal outputs."""
    if len(set(hashes)) < len(hashes):
        return "repeated_output: two rounds with different latents gave the same output, as if one had been cached"
    return None
