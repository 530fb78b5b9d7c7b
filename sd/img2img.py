"""Image to image: `python -m sd.img2img --init-img sketch.png --prompt "a red circle"`.

Accepts the flags of the original scripts, with their meaning, and samplers other than their DDIM.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sd.cli.startup import exit_on_interrupt

if TYPE_CHECKING:  # functions import what imports torch, which Ctrl-C may interrupt
    from torch import Tensor

    from sd.config.presets import ModelConfig
    from sd.pipeline import Progress, Result
    from sd.sampling.noise import NoiseSource

REFUSED = {
    "--fixed_code": "img2img starts from the image, not from noise: omit it, or use --rng",
    "--torchscript": "not supported: use --compile",
    "--ipex": "not supported: PyTorch's own CPU kernels are used; use --precision bf16",
}


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    from sd.cli.arguments import add_options, nonnegative
    from sd.images import SIZE_MULTIPLE

    result = argparse.ArgumentParser(
        prog="img2img", description="Generate images from an image and a prompt.", allow_abbrev=False
    )
    add_options(result, "outputs/img2img-samples", REFUSED)
    add = result.add_argument
    add("--init-img", required=True, metavar="FILE", help=f"image; its sides become multiples of {SIZE_MULTIPLE}")
    add(
        "--strength",
        type=_fraction,
        help="fraction of the noise schedule, 0 to 1 (default: the original scripts', 0.75 for SD1, 0.8 for SD2)",
    )
    add(
        "--scale",
        type=nonnegative,
        help="guidance scale, 1 for none (default: the original scripts', 5.0 for SD1, 9.0 for SD2; tiny: 4.0)",
    )
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 2 for an error of the user, 130 when interrupted."""
    with exit_on_interrupt():
        from sd.cli.run import guarded
    return guarded(lambda: _run(parser().parse_args(argv)), "a smaller --n_samples, a smaller --init-img")


def _fraction(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}: must be in [0, 1]")
    return value


def default_strength_and_scale(config: ModelConfig) -> tuple[float, float]:
    """Return the default strength and guidance scale of the original script of the model."""
    if config.name == "tiny":
        return 0.8, 4.0
    if config.unet.guidance_embedding is not None:
        return 0.8, 8.5
    return (0.75, 5.0) if config.text.kind == "clip" else (0.8, 9.0)


def _run(args: argparse.Namespace) -> None:
    from sd.cli.arguments import sampling, sampling_settings
    from sd.cli.input_images import read_image
    from sd.cli.run import Command

    sampled = sampling(args)
    image = read_image(args.init_img)
    command = Command(args, os.environ, sampled)
    model = command.model
    strength, scale = default_strength_and_scale(model.config)
    strength = strength if args.strength is None else args.strength
    scale = scale if args.scale is None else args.scale
    settings = {
        "init_img": Path(args.init_img).name,
        "strength": strength,
        **sampling_settings(sampled),
        "scale": scale,
        "size": f"{image.shape[2]}x{image.shape[1]}",
        "rng": args.rng,
    }

    def generate(prompts: list[str], noise: NoiseSource, latents: Tensor | None, progress: Progress) -> Result:
        return model.img2img(
            prompts,
            image,
            strength=strength,
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
