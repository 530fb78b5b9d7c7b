"""Inpainting: `python -m sd.inpaint --init-img photo.png --mask mask.png --prompt "a red circle"`.

Repaints the white part of the mask. Accepts inpainting models and, by blending, text-to-image models.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sd.cli.startup import exit_on_interrupt

if TYPE_CHECKING:  # functions import what imports torch, which Ctrl-C may interrupt
    from PIL.Image import Image
    from torch import Tensor

    from sd.config.presets import ModelConfig
    from sd.pipeline import Progress, Result
    from sd.sampling.noise import NoiseSource

REFUSED = {
    "--fixed_code": "inpainting has noise of its own for every image: omit it, or repeat --seed",
    "--torchscript": "not supported: use --compile",
    "--ipex": "not supported: PyTorch's own CPU kernels are used; use --precision bf16",
}


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    from sd.cli.arguments import add_options, nonnegative
    from sd.images import SIZE_MULTIPLE

    result = argparse.ArgumentParser(
        prog="inpaint", description="Repaint a part of an image from a prompt.", allow_abbrev=False
    )
    add_options(result, "outputs/inpaint-samples", REFUSED)
    result.set_defaults(embedded="tiny-inpaint")
    add = result.add_argument
    add("--init-img", required=True, metavar="FILE", help=f"image; its sides become multiples of {SIZE_MULTIPLE}")
    add("--mask", required=True, metavar="FILE", help="image of the same size; its white part is repainted")
    add(
        "--strength",
        type=_positive_fraction,
        default=1.0,
        help="fraction of the steps that run, above 0; 1 starts from noise, less from the noised image (default: 1)",
    )
    add(
        "--scale",
        type=nonnegative,
        help="guidance scale, 1 for none (default: the original scripts', 7.5 for SD1, 10.0 for SD2; tiny: 4.0)",
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
    from sd.cli.input_images import open_image
    from sd.images import image_with_mask

    def with_image(image: Image) -> tuple[Tensor, Tensor]:
        return open_image(mask_path, "--mask", lambda mask: image_with_mask(image, mask))

    image, mask = open_image(image_path, "--init-img", with_image)
    return image, mask


def default_scale(config: ModelConfig) -> float:
    """Return the default guidance scale of the original script of the model."""
    if config.name.startswith("tiny"):
        return 4.0
    return 7.5 if config.text.kind == "clip" else 10.0


def _run(args: argparse.Namespace) -> None:
    from sd.cli.arguments import sampling, sampling_settings
    from sd.cli.run import Command

    sampled = sampling(args)
    image, mask = read_image_with_mask(args.init_img, args.mask)
    command = Command(args, os.environ, sampled)
    model = command.model
    scale = default_scale(model.config) if args.scale is None else args.scale
    settings = {
        "init_img": Path(args.init_img).name,
        "mask": Path(args.mask).name,
        "strength": args.strength,
        **sampling_settings(sampled),
        "scale": scale,
        "size": f"{image.shape[2]}x{image.shape[1]}",
        "rng": args.rng,
    }

    def generate(prompts: list[str], noise: NoiseSource, latents: Tensor | None, progress: Progress) -> Result:
        return model.inpaint(
            prompts,
            image,
            mask,
            strength=args.strength,
            **sampled,
            scale=scale,
            negative_prompt=args.negative_prompt,
            rng=noise,
            progress=progress,
            prompt_chunks=args.prompt_chunks,
        )

    command.run(generate, settings)


if __name__ == "__main__":
    raise SystemExit(main())
