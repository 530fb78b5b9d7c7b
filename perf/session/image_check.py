"""Validate each timed image against the fp32 reference; a failed check invalidates the timing."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from perf.configurations.configuration import Configuration


def image_seeds(configuration: Configuration, seed: int) -> list[int]:
    """The seeds of a round's images: image i has seed + i, at any batch size."""
    return [seed + i for i in range(configuration.batch)]


def reference_path(folder: Path, configuration: Configuration, seed: int, weights: dict, origin: dict) -> Path:
    """Where the reference of one image is kept. The name is a hash of all that its pixels depend on.

    origin: what random weights depend on besides their seed (torch and device), as machine facts.
    """
    what = {**configuration.reference().as_dict(), "seed": seed, "weights": weights, "format": 1}
    for path in ("checkpoint", "config"):  # the same weights under another name are the same weights
        what[path] = what[path] if weights["sha256"] is None else None
    del what["id"], what["interpreter"]
    if weights["kind"] == "random":
        what["origin"] = {key: origin.get(key) for key in ("device", "torch")}
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    return folder / f"{digest[:40]}.npz"


@dataclass(frozen=True)
class Bounds:
    """How far a right picture may be from the fp32 reference."""

    latent_relative_error: float
    psnr_db: float


# By what computes. Measured on the embedded model over 20 steps at guidance 7.5: fp32 5e-6 and 83 dB, fp16 0.008 and
# 52 dB, bf16 0.08 and 24 dB; the bounds leave a factor of 3 to 6, and fp32 what another torch or a compiler may reorder.
BOUNDS = {"fp32": Bounds(1e-3, 45.0), "fp16": Bounds(0.05, 35.0), "bf16": Bounds(0.25, 16.0)}


# What fp32 alone moves latents by, ten times over.
EXACT_ERROR = 1e-4


# What is approximate by intent. How far its picture goes depends on the prompt more than on the technique: of the embedded
# model at guidance 7.5 latents were measured up to 1.2 away, where the same techniques at 4.0 keep 40 dB
# (tests/sd/test_approximate.py has their bounds). Unrelated latents are 1.41 apart: more is a fault.
APPROXIMATE_BOUNDS = Bounds(1.41, 0.0)


def computing_type(precision: str, device: str) -> str:
    """What computes under a precision: autocast is fp16 on CUDA, as published, and bf16 on a CPU."""
    if precision == "autocast":
        return "fp16" if device == "cuda" else "bf16"
    return "fp32" if precision == "full" else precision


def wrong(examined: dict, precision: str, device: str, approximate: bool = False) -> str | None:
    """Why the picture is not right, as `code: words`, or None. The bounds are two-sided where sameness is suspicious.

    approximate: whether the picture is another one by intent.
    """
    if not examined["finite"]:
        return "not_finite: the latents hold NaN or infinity; try precision full or bf16"
    if examined["constant"]:
        return "constant: a picture of one colour"
    computing = computing_type(precision, device)
    error, psnr = examined["latent_relative_error"], examined["psnr_db"]
    bounds = APPROXIMATE_BOUNDS if approximate else BOUNDS[computing]
    if error is None:
        return None
    if error > bounds.latent_relative_error:
        return f"latents: {error:.2g} away from the fp32 reference, {bounds.latent_relative_error:g} allowed in {computing}"
    if psnr is not None and psnr < bounds.psnr_db:
        return f"picture: {psnr:.1f} dB from the fp32 reference, at least {bounds.psnr_db:g} wanted in {computing}"
    if computing != "fp32" and error == 0:
        return f"suspiciously_equal: {precision} gave the very numbers of fp32, so it did not run in {precision}"
    if approximate and error < EXACT_ERROR:
        return f"suspiciously_equal: latents {error:.2g} away from the exact ones, so nothing was approximated"
    return None


def repeated(hashes: list[str]) -> str | None:
    """Why the rounds of one launch cannot be what they say: with different latents no two outputs are the same."""
    if len(set(hashes)) < len(hashes):
        return "repeated_output: two rounds with different latents gave the same output, as if one had been cached"
    return None
