"""Prompts to pictures: `python -m sd.txt2img --prompt "a red circle on a blue background"`.

Takes every flag of the two original scripts (CompVis/stable-diffusion, Stability-AI/stablediffusion) that concerns
inference, and those of the published experiment, with their meaning.
"""

from __future__ import annotations

import argparse
import os

from sd.cli import arguments as options
from sd.cli import run as cli
from sd.config.presets import ModelConfig, ScheduleConfig
from sd.errors import ConfigError
from sd.pipeline import SIZE_MULTIPLE
from sd.sampling.samplers import SAMPLERS
from sd.sampling.samplers import sampler as sampler_named
from sd.sampling.schedule import Schedule

REFUSED = {
    "--torchscript": "is not offered here: use --compile",
    "--ipex": "is not offered here: PyTorch's own CPU kernels are used; use --precision bf16",
    "--laion400m": "is another model, which cannot be run here: give a Stable Diffusion 1 or 2 model with --ckpt",
}


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    result = argparse.ArgumentParser(prog="txt2img", description="Draw pictures of a prompt.", allow_abbrev=False)
    options.add_options(result, outdir="outputs/txt2img-samples")
    add = result.add_argument
    add(
        "--scale",
        type=float,
        help="guidance, 1 for none (default, as the originals': 7.5 for SD1, 9.0 for SD2; tiny: 4.0)",
    )
    add("--sampler", choices=SAMPLERS, help="default: ddim")
    add("--plms", action="store_true", help="the same as --sampler plms")
    add("--dpm", "--dpm_solver", dest="dpm", action="store_true", help="the same as --sampler dpm_solver")
    add("--fixed_code", action="store_true", help="start every batch from the same noise")
    add("--H", type=options.positive, help=f"height in pixels, a multiple of {SIZE_MULTIPLE} (default: the model's)")
    add("--W", type=options.positive, help=f"width in pixels, a multiple of {SIZE_MULTIPLE} (default: the model's)")
    for flag, why in REFUSED.items():
        add(flag, action="store_true", help=f"refused: {why}")
    return result


def main(argv=None) -> int:
    """The command; returns its exit status: 0, 2 for an error that the user can mend, 130 when interrupted."""
    args = parser().parse_args(argv)
    return cli.guarded(lambda: _run(args, os.environ))


def default_scale(config: ModelConfig) -> float:
    """Guidance when none is asked for: the default of the script that belongs to the model."""
    if config.name == "tiny":
        return 4.0
    return 7.5 if config.text.kind == "clip" else 9.0


def _run(args, environ) -> None:
    for flag, why in REFUSED.items():
        if getattr(args, flag.lstrip("-")):
            raise ConfigError(f"{flag} {why}")
    options.check_numbers(args)
    _check_size(args)
    sampler = _sampler(args)
    setup = options.setup(args, environ)
    _check_plan(sampler, args, setup.config)
    batches = options.prompt_batches(args, setup.default_prompt)
    album, model, load_seconds = cli.begin(args, setup)
    scale = default_scale(model.config) if args.scale is None else args.scale
    shape = model.latent_shape(args.n_samples, args.H, args.W)
    height, width = (size * model.config.autoencoder.downsampling for size in shape[2:])
    settings = {
        "steps": args.steps,
        "sampler": sampler,
        "eta": args.ddim_eta,
        "scale": scale,
        "size": f"{width}x{height}",
        "rng": args.rng + (" with fixed code" if args.fixed_code else ""),
        **cli.describe(model, setup.checkpoint),
    }
    print(", ".join(f"{key} {value}" for key, value in settings.items()))

    def draw(prompts, source, latents, progress):
        return model.txt2img(
            prompts,
            steps=args.steps,
            sampler=sampler,
            scale=scale,
            height=args.H,
            width=args.W,
            latents=latents,
            negative_prompt=args.negative_prompt,
            eta=args.ddim_eta,
            rng=source,
            progress=progress,
        )

    cli.produce(args, model, batches, draw, settings, album, load_seconds, shape if args.fixed_code else None)


def _sampler(args) -> str:
    asked = {
        flag: name
        for flag, name, given in (
            ("--plms", "plms", args.plms),
            ("--dpm", "dpm_solver", args.dpm),
            (f"--sampler {args.sampler}", args.sampler, args.sampler is not None),
        )
        if given
    }
    if len(set(asked.values())) > 1:
        raise ConfigError(f"{' and '.join(asked)} contradict each other: give one of them")
    return next(iter(asked.values()), "ddim")


def _check_plan(name: str, args, config: ModelConfig | None) -> None:
    """Plan the run, so that an impossible step count or eta is known before gigabytes are read."""
    schedule = Schedule(config.schedule if config is not None else ScheduleConfig())
    sampler_named(name)(schedule, args.steps, args.ddim_eta)


def _check_size(args) -> None:
    for flag, size in (("--H", args.H), ("--W", args.W)):
        if size is not None and size % SIZE_MULTIPLE:
            nearest = max(round(size / SIZE_MULTIPLE), 1) * SIZE_MULTIPLE
            raise ConfigError(f"{flag} {size}: must be a multiple of {SIZE_MULTIPLE}, such as {nearest}")


if __name__ == "__main__":
    raise SystemExit(main())
