"""Text to image: `python -m sd.txt2img --prompt "a red circle on a blue background"`.

Accepts the inference flags of the two original scripts (CompVis/stable-diffusion, Stability-AI/stablediffusion) and those
of the published experiment, with their meaning.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from sd.cli.startup import REFUSED, exit_on_interrupt

if TYPE_CHECKING:  # functions import what imports torch, which Ctrl-C may interrupt
    from torch import Tensor

    from sd.config.presets import ModelConfig
    from sd.pipeline import Progress, Result
    from sd.sampling.noise import NoiseSource

LAION400M = {"--laion400m": "another model, which is not supported: pass a Stable Diffusion 1 or 2 model with --ckpt"}


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    from sd.cli.arguments import add_options, nonnegative, size
    from sd.images import SIZE_MULTIPLE

    result = argparse.ArgumentParser(prog="txt2img", description="Generate images from a prompt.", allow_abbrev=False)
    add_options(result, "outputs/txt2img-samples", {**REFUSED, **LAION400M})
    add = result.add_argument
    add(
        "--scale",
        type=nonnegative,
        help="guidance scale, 1 for none (default: the original scripts', 7.5 for SD1, 9.0 for SD2; tiny: 4.0)",
    )
    add(
        "--from-png",
        metavar="FILE",
        help="repeat an image of txt2img, or of AUTOMATIC1111's web UI, from its metadata; other options replace those of it",
    )
    add("--fixed_code", action="store_true", help="start every batch from the same noise")
    for flag, side in (("--H", "height"), ("--W", "width")):
        add(flag, type=size, help=f"{side} in pixels, a multiple of {SIZE_MULTIPLE} (default: the model's)")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 2 for an error of the user, 130 when interrupted."""
    with exit_on_interrupt():
        from sd.cli.run import guarded
    arguments = sys.argv[1:] if argv is None else argv
    return guarded(lambda: _run(arguments), "a smaller --n_samples, a smaller image (--H, --W)")


def default_scale(config: ModelConfig) -> float:
    """Return the default guidance scale of the original script of the model."""
    if config.name == "tiny":
        return 4.0
    if config.unet.guidance_embedding is not None:
        return 8.5  # of the paper's and diffusers' pipeline for latent consistency models
    return 7.5 if config.text.kind == "clip" else 9.0


def _run(argv: list[str]) -> None:
    from sd.cli.arguments import sampling, sampling_settings
    from sd.cli.metadata import repeat, warn_of_other_machine
    from sd.cli.run import Command

    options, recorded = parser(), None
    args = options.parse_args(argv)
    if args.from_png is not None:
        args, recorded = repeat(options, args, argv)
    sampled = sampling(args)
    command = Command(args, os.environ, sampled)
    model = command.model
    if recorded is not None:
        warn_of_other_machine(recorded, model.device)
    scale = default_scale(model.config) if args.scale is None else args.scale
    shape = model.latent_shape(args.n_samples, args.H, args.W)
    height, width = (cells * model.config.autoencoder.downsampling for cells in shape[2:])
    settings = {
        **sampling_settings(sampled),
        "scale": scale,
        "size": f"{width}x{height}",
        "rng": args.rng + (" with fixed code" if args.fixed_code else ""),
    }

    def generate(prompts: list[str], noise: NoiseSource, latents: Tensor | None, progress: Progress) -> Result:
        return model.txt2img(
            prompts,
            **sampled,
            scale=scale,
            height=args.H,
            width=args.W,
            latents=latents,
            negative_prompt=args.negative_prompt,
            rng=noise,
            progress=progress,
            prompt_chunks=args.prompt_chunks,
        )

    command.run(generate, settings, shape if args.fixed_code else None)


if __name__ == "__main__":
    raise SystemExit(main())
