"""Options and run that img2img, inpaint and depth2img share: their input is an image, and they call one method of the model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from sd.cli.arguments import add_options, nonnegative, sampling_settings
from sd.cli.run import Command
from sd.cli.startup import REFUSED
from sd.config.presets import ModelConfig
from sd.images import SIZE_MULTIPLE
from sd.pipeline import Progress, Result
from sd.sampling.noise import NoiseSource


def image_parser(name: str, description: str, fixed_code: str, scale: str) -> argparse.ArgumentParser:
    """Build a parser with the shared options. fixed_code: why --fixed_code is refused. scale: default, for the help."""
    result = argparse.ArgumentParser(prog=name, description=description, allow_abbrev=False)
    add_options(result, f"outputs/{name}-samples", {"--fixed_code": fixed_code, **REFUSED})
    add = result.add_argument
    add("--init-img", required=True, metavar="FILE", help=f"image; its sides become multiples of {SIZE_MULTIPLE}")
    add("--scale", type=nonnegative, help=f"guidance scale, 1 for none (default: the original scripts', {scale})")
    return result


def fraction(text: str) -> float:
    """Parse a number in [0, 1]."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}: must be in [0, 1]")
    return value


def run(
    args: argparse.Namespace,
    sampled: Mapping[str, object],
    method: Callable[..., Result],
    inputs: tuple[Tensor, ...],
    files: Mapping[str, str],
    defaults: Callable[[ModelConfig], tuple[float, float]],
) -> None:
    """Generate and save the images of a command.

    sampled: from sd.cli.arguments.sampling. method: of StableDiffusion, unbound. inputs: its arguments between prompts and
    strength. files: of the inputs, by their keys in the metadata. defaults: strength and scale of the model.
    """
    command = Command(args, os.environ, sampled)
    strength, scale = defaults(command.model.config)
    strength = strength if args.strength is None else args.strength
    scale = scale if args.scale is None else args.scale
    settings = {
        **{key: Path(path).name for key, path in files.items()},
        "strength": strength,
        **sampling_settings(sampled),
        "scale": scale,
        "size": f"{inputs[0].shape[2]}x{inputs[0].shape[1]}",
        "rng": args.rng,
    }

    def generate(prompts: list[str], noise: NoiseSource, latents: Tensor | None, progress: Progress) -> Result:
        return method(
            command.model,
            prompts,
            *inputs,
            strength=strength,
            **sampled,
            scale=scale,
            negative_prompt=args.negative_prompt,
            rng=noise,
            progress=progress,
            prompt_chunks=args.prompt_chunks,
        )

    command.run(generate, settings)
