"""Inpainting: `python -m sd.inpaint --init-img photo.png --mask mask.png --prompt "a red circle"`.

Repaints the white part of the mask. Accepts inpainting models and, by blending, text-to-image models.
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
    from sd.cli.from_image import image_parser

    result = image_parser(
        "inpaint",
        "Repaint a part of an image from a prompt.",
        "inpainting has noise of its own for every image: omit it, or repeat --seed",
        "7.5 for SD1, 10.0 for SD2; tiny: 4.0",
    )
    result.set_defaults(embedded="tiny-inpaint")
    add = result.add_argument
    add("--mask", required=True, metavar="FILE", help="image of the same size; its white part is repainted")
    add(
        "--strength",
        type=_positive_fraction,
        help="fraction of the steps that run, above 0; 1 starts from noise, less from the noised image (default: 1)",
    )
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 2 for an error of the user, 130 when interrupted."""
    with exit_on_interrupt():
        from sd.cli.run import guarded
    return guarded(lambda: _run(parser().parse_args(argv)), "a smaller --n_samples, a smaller --init-img and --mask")


def _positive_fraction(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most 1")
    return value


def read_image_with_mask(image_path: str, mask_path: str) -> tuple[Tensor, Tensor]:
    """Read image [3, H, W] and mask [H, W] (see sd.images.image_with_mask). Raises ConfigError naming the file."""
    from sd.cli.input_images import open_pair
    from sd.images import image_with_mask

    return open_pair(image_path, "--mask", mask_path, image_with_mask)


def default_strength_and_scale(config: ModelConfig) -> tuple[float, float]:
    """Return the default strength, and the default guidance scale of the original script of the model."""
    if config.name.startswith("tiny"):
        return 1.0, 4.0
    return (1.0, 7.5) if config.text.kind == "clip" else (1.0, 10.0)


def _run(args: argparse.Namespace) -> None:
    from sd.cli.arguments import sampling
    from sd.cli.from_image import run
    from sd.pipeline import StableDiffusion

    sampled = sampling(args)
    inputs = read_image_with_mask(args.init_img, args.mask)
    files = {"init_img": args.init_img, "mask": args.mask}
    run(args, sampled, StableDiffusion.inpaint, inputs, files, default_strength_and_scale)


if __name__ == "__main__":
    raise SystemExit(main())
