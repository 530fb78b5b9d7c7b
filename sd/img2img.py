"""Image to image: `python -m sd.img2img --init-img sketch.png --prompt "a red circle"`.

Accepts the flags of the original scripts, with their meaning, and samplers other than their DDIM.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sd.cli.startup import exit_on_interrupt

if TYPE_CHECKING:  # functions import what imports torch, which Ctrl-C may interrupt
    from sd.config.presets import ModelConfig


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    from sd.cli.from_image import fraction, image_parser

    result = image_parser(
        "img2img",
        "Generate images from an image and a prompt.",
        "img2img starts from the image, not from noise: omit it, or use --rng",
        "5.0 for SD1, 9.0 for SD2; tiny: 4.0",
    )
    result.add_argument(
        "--strength",
        type=fraction,
        help="fraction of the noise schedule, 0 to 1 (default: the original scripts', 0.75 for SD1, 0.8 for SD2)",
    )
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 2 for an error of the user, 130 when interrupted."""
    with exit_on_interrupt():
        from sd.cli.run import guarded
    return guarded(lambda: _run(parser().parse_args(argv)), "a smaller --n_samples, a smaller --init-img")


def default_strength_and_scale(config: ModelConfig) -> tuple[float, float]:
    """Return the default strength and guidance scale of the original script of the model."""
    if config.name == "tiny":
        return 0.8, 4.0
    if config.unet.guidance_embedding is not None:
        return 0.8, 8.5
    return (0.75, 5.0) if config.text.kind == "clip" else (0.8, 9.0)


def _run(args: argparse.Namespace) -> None:
    from sd.cli.arguments import sampling
    from sd.cli.from_image import run
    from sd.cli.input_images import read_image
    from sd.pipeline import StableDiffusion

    sampled = sampling(args)
    image = read_image(args.init_img)
    run(args, sampled, StableDiffusion.img2img, (image,), {"init_img": args.init_img}, default_strength_and_scale)


if __name__ == "__main__":
    raise SystemExit(main())
