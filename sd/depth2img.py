"""Depth to image: `python -m sd.depth2img --ckpt 512-depth-ema.ckpt --init-img photo.png --depth depth.png --prompt "a robot"`.

Generates images with the depth of a photograph. The depth image is given: the original's estimator (MiDaS) is not included.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sd.cli.startup import exit_on_interrupt

if TYPE_CHECKING:  # functions import what imports torch, which Ctrl-C may interrupt
    from torch import Tensor

    from sd.config.presets import ModelConfig


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    from sd.cli.from_image import fraction, image_parser

    result = image_parser(
        "depth2img",
        "Generate images from an image, its depth and a prompt, with a depth-to-image model.",
        "depth2img has noise of its own for every image: omit it, or repeat --seed",
        "9.0",
    )
    result.set_defaults(embedded=None)
    add = result.add_argument
    add(
        "--depth",
        metavar="FILE",
        help="grey image of the same size, of 8 or 16 bits or float, brighter where nearer; required, since no depth "
        "estimator is included",
    )
    add(
        "--strength",
        type=fraction,
        help="fraction of the noise schedule, 0 to 1; 1 starts from noise, and uses only the depth (default: the original "
        "script's, 0.9)",
    )
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 2 for an error of the user, 130 when interrupted."""
    with exit_on_interrupt():
        from sd.cli.run import guarded
    return guarded(lambda: _run(parser().parse_args(argv)), "a smaller --n_samples, a smaller --init-img and --depth")


def read_image_with_depth(image_path: str, depth_path: str) -> tuple[Tensor, Tensor]:
    """Read image [3, H, W] and depth map (see sd.images.image_with_depth). Raises ConfigError naming the file."""
    from sd.cli.input_images import open_pair
    from sd.images import image_with_depth

    return open_pair(image_path, "--depth", depth_path, image_with_depth)


def default_strength_and_scale(config: ModelConfig) -> tuple[float, float]:
    """Return the default strength and guidance scale of the original script."""
    return 0.9, 9.0


def _run(args: argparse.Namespace) -> None:
    from sd.cli.arguments import sampling
    from sd.cli.from_image import run
    from sd.errors import ConfigError
    from sd.pipeline import StableDiffusion

    sampled = sampling(args)
    if args.depth is None:
        raise ConfigError("--depth: is missing, and no depth estimator (MiDaS) is included: pass --depth FILE")
    inputs = read_image_with_depth(args.init_img, args.depth)
    files = {"init_img": args.init_img, "depth": args.depth}
    run(args, sampled, StableDiffusion.depth2img, inputs, files, default_strength_and_scale)


if __name__ == "__main__":
    raise SystemExit(main())
