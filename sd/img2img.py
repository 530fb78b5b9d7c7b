"""A picture and a prompt to pictures: `python -m sd.img2img --init-img sketch.png --prompt "a red circle"`.

Takes the flags of the original scripts, with their meaning; DDIM only, as there.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from sd.cli import arguments as options
from sd.cli import run as cli
from sd.config.presets import ModelConfig, ScheduleConfig
from sd.errors import ConfigError
from sd.pipeline import SIZE_MULTIPLE
from sd.sampling.samplers import ddim
from sd.sampling.schedule import Schedule

_DDIM = "img2img starts in the middle of DDIM's steps and knows no other sampler: leave it out"
REFUSED = {
    "--plms": _DDIM,
    "--dpm": _DDIM,
    "--dpm_solver": _DDIM,
    "--fixed_code": "img2img starts from the picture, not from noise: leave it out, or use --rng",
    "--torchscript": "is not offered here: use --compile",
    "--ipex": "is not offered here: PyTorch's own CPU kernels are used; use --precision bf16",
}
LARGEST = 64 * 2**20  # pixels of a picture to be read, before a small file fills the memory


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    result = argparse.ArgumentParser(prog="img2img", description="Draw over a picture.", allow_abbrev=False)
    options.add_options(result, outdir="outputs/img2img-samples")
    add = result.add_argument
    add("--init-img", required=True, metavar="FILE", help=f"the picture; its sides become multiples of {SIZE_MULTIPLE}")
    add(
        "--strength",
        type=float,
        help="how much to noise it, 0 to 1 (default, as the originals': 0.75 for SD1, 0.8 for SD2)",
    )
    add(
        "--scale",
        type=float,
        help="guidance, 1 for none (default, as the originals': 5.0 for SD1, 9.0 for SD2; tiny: 4.0)",
    )
    add("--sampler", choices=("ddim",), default="ddim", help="ddim only")
    for flag, why in REFUSED.items():
        add(flag, action="store_true", help=f"refused: {why}")
    return result


def main(argv=None) -> int:
    """The command; returns its exit status: 0, 2 for an error that the user can mend, 130 when interrupted."""
    args = parser().parse_args(argv)
    return cli.guarded(lambda: _run(args, os.environ))


def read_picture(path):
    """A picture file -> float32 [3, H, W] in [-1, 1], each side cut down to a multiple of 64 by resampling (LANCZOS).

    Raises ConfigError naming the file.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = (size // SIZE_MULTIPLE * SIZE_MULTIPLE for size in image.size)
            if not width or not height:
                raise ConfigError(f"--init-img {path}: has fewer than {SIZE_MULTIPLE} pixels a side; enlarge it first")
            if image.size[0] * image.size[1] > LARGEST:
                raise ConfigError(f"--init-img {path}: has more than {LARGEST} pixels; make it smaller first")
            if image.mode[0] in "IF":  # convert would cut their numbers off at 255
                raise ConfigError(f"--init-img {path}: has more than 8 bits a channel ({image.mode}); save it with 8")
            image = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    except OSError as error:  # also what Pillow raises for what it cannot identify
        raise ConfigError(f"--init-img {path}: cannot be read as a picture ({error.strerror or error})") from None
    except (ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:  # as decoders raise them
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--init-img {path}: cannot be read as a picture ({error})") from None
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(height, width, 3)
    return pixels.permute(2, 0, 1).float() / 255 * 2 - 1


def _defaults(config: ModelConfig) -> tuple[float, float]:
    """Strength and guidance when none are asked for: those of the script that belongs to the model."""
    if config.name == "tiny":
        return 0.8, 4.0
    return (0.75, 5.0) if config.text.kind == "clip" else (0.8, 9.0)


def _run(args, environ) -> None:
    for flag, why in REFUSED.items():
        if getattr(args, flag.lstrip("-")):
            raise ConfigError(f"{flag}: {why}")
    options.check_numbers(args)
    if args.strength is not None and not 0.0 <= args.strength <= 1.0:
        raise ConfigError(f"--strength {args.strength}: must be in [0, 1]")
    setup = options.setup(args, environ)
    # Planned here too, so that an impossible step count or eta is known before gigabytes are read.
    ddim(Schedule(setup.config.schedule if setup.config is not None else ScheduleConfig()), args.steps, args.ddim_eta)
    image = read_picture(args.init_img)
    batches = options.prompt_batches(args, setup.default_prompt)
    album, model, load_seconds = cli.begin(args, setup)
    strength, scale = _defaults(model.config)
    strength = strength if args.strength is None else args.strength
    scale = scale if args.scale is None else args.scale
    settings = {
        "init_img": Path(args.init_img).name,
        "strength": strength,
        "steps": args.steps,
        "sampler": "ddim",
        "eta": args.ddim_eta,
        "scale": scale,
        "size": f"{image.shape[2]}x{image.shape[1]}",
        "rng": args.rng,
        **cli.describe(model, setup.checkpoint),
    }
    print(", ".join(f"{key} {value}" for key, value in settings.items()))

    def draw(prompts, source, latents, progress):
        return model.img2img(
            prompts,
            image,
            strength=strength,
            steps=args.steps,
            scale=scale,
            negative_prompt=args.negative_prompt,
            eta=args.ddim_eta,
            rng=source,
            progress=progress,
        )

    cli.produce(args, model, batches, draw, settings, album, load_seconds)


if __name__ == "__main__":
    raise SystemExit(main())
