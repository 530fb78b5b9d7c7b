"""Options shared by the commands that generate images, their values, and the prompts that they select."""

from __future__ import annotations

import argparse
import math
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from sd import __version__
from sd.attention.functions import DEFAULT_ATTENTION
from sd.choices import ATTENTION as IMPLEMENTATIONS
from sd.choices import (
    ATTENTION_PRECISIONS,
    COMPILE_BACKENDS,
    COMPILE_MODES,
    OPTIMISE_PRESETS,
    PRECISIONS,
    RNGS,
    SAMPLERS,
    SDPA_KERNELS,
    SIGMAS,
    TIMESTEP_SPACINGS,
)
from sd.cli.startup import add_parts
from sd.config.presets import PRESETS, ModelConfig
from sd.errors import ConfigError, SDWarning, listed
from sd.images import require_size
from sd.optimise.presets import TECHNIQUES
from sd.prompts import PromptChunks

PROMPT = "a professional photograph of an astronaut riding a triceratops"  # of the original scripts
TINY_PROMPT = "a red circle on a blue background"
RANDOM_SEED = -1  # of --seed, as in AUTOMATIC1111's web UI
PUBLISHED_KERNELS = ("math", "mem_efficient", "flash")  # of torch 2.0, to which the published --disable flags refer

T = TypeVar("T")


def add_options(parser: argparse.ArgumentParser, outdir: str, refused: Mapping[str, str]) -> None:
    """Add the options that all these commands have, and those that the command refuses (flag -> reason)."""
    parser.set_defaults(embedded="tiny")  # preset of the embedded model that runs without --ckpt, None for none
    version = f"%(prog)s of sd-perf {__version__}, torch {torch.__version__}"
    parser.add_argument("--version", action="version", version=version, help="print the versions and exit")
    _add_task(parser.add_argument, outdir)
    _add_sampling(parser.add_argument_group("sampling").add_argument)
    _add_model(parser.add_argument_group("model").add_argument)
    _add_execution(parser.add_argument_group("execution").add_argument)
    for flag, reason in refused.items():
        parser.add_argument(flag, action="append_const", dest="refused", const=f"{flag}: {reason}", help=reason)


def _add_task(add: Callable[..., object], outdir: str) -> None:
    add("--prompt", help=f"text of the image (default: {PROMPT!r}; tiny: {TINY_PROMPT!r})")
    add("--negative-prompt", default="", help="text of what to avoid")
    add(
        "--prompt-chunks",
        type=chunks,
        default=1,
        metavar="N",
        help="chunks of 75 tokens in which prompts are encoded; auto: as many as the longest prompt of a batch needs "
        "(default: 1, after which prompts are truncated)",
    )
    add("--from-file", metavar="FILE", help="prompts, one per line, in batches of --n_samples, instead of --prompt")
    add("--repeat", type=positive, default=1, help="repetitions of each prompt of --from-file (default: 1)")
    add("--outdir", default=outdir, help="folder of samples/NNNNN.png and grid-NNNN.png (default: %(default)s)")
    add("--skip_save", action="store_true", help="do not save single images")
    add("--skip_grid", action="store_true", help="do not save the grid")
    add("--n_rows", type=natural, default=0, help="images per row of the grid (default: --n_samples)")
    add("--n_iter", type=positive, default=1, help="iterations (default: 1; the original scripts: 2 and 3)")
    add("--n_samples", type=positive, default=1, help="batch size (default: 1; the original scripts: 3)")
    add("--seed", type=seed, default=42, help="image k of the run has seed + k; -1: random (default: 42)")
    add(
        "--rng",
        choices=RNGS,
        default="per-image",
        help="per-image: the noise of an image depends on its seed alone; original: one draw for the whole batch on "
        "the device, as in the original scripts (default: per-image)",
    )


def _add_sampling(add: Callable[..., object]) -> None:
    add("--steps", "--ddim_steps", type=positive, default=50, help="sampling steps (default: 50)")
    add("--sampler", action="append", choices=SAMPLERS, help="default: ddim")
    add("--plms", action="append_const", dest="sampler", const="plms", help="the same as --sampler plms")
    add(
        "--dpm",
        "--dpm_solver",
        action="append_const",
        dest="sampler",
        const="dpm_solver",
        help="the same as --sampler dpm_solver",
    )
    add("--timestep-spacing", choices=TIMESTEP_SPACINGS, help="timesteps that are visited (default: the sampler's own)")
    add(
        "--sigmas",
        choices=SIGMAS,
        default="schedule",
        help="noise levels: of the timesteps, or Karras (arXiv 2206.00364)",
    )
    add("--ddim_eta", type=nonnegative, default=0.0, help="0: deterministic, 1: ancestral; DDIM only (default: 0)")


def sampling(args: Namespace) -> dict[str, Any]:
    """Arguments of the methods of StableDiffusion by the options of sampling. Raises ConfigError for two samplers."""
    return {
        "steps": args.steps,
        "sampler": single("--sampler", args.sampler, "ddim"),
        "eta": args.ddim_eta,
        "timestep_spacing": args.timestep_spacing,
        "sigmas": args.sigmas,
    }


def sampling_settings(sampled: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments from `sampling` as settings of an image; timestep spacing and sigmas only where they are not the default."""
    return {
        name: value for name, value in sampled.items() if value is not None and (name, value) != ("sigmas", "schedule")
    }


def _add_model(add: Callable[..., object]) -> None:
    add("--ckpt", metavar="FILE", help=".ckpt, .safetensors or diffusers folder (default: the embedded tiny model)")
    add(
        "--config",
        help=f"a preset ({', '.join(PRESETS)}) or a YAML file in the original layout (default: detected from the "
        "weights, SD2 as predicting eps: pass sd2-v for v models)",
    )
    add(
        "--lora",
        metavar="FILE[:SCALE]",
        type=lora_file,
        action="append",
        default=[],
        help="LoRA to merge into the weights, with a factor (default: 1); may be repeated",
    )
    add(
        "--embedding",
        metavar="FILE[:TOKEN]",
        type=embedding_file,
        action="append",
        default=[],
        help="textual-inversion embedding, with its word in prompts (default: the file's own); may be repeated",
    )
    add_parts(add)
    add("--C", type=positive, help="latent channels; must be those of the model")
    add("--f", type=positive, help="pixels per latent cell; must be those of the model")


def _add_execution(add: Callable[..., object]) -> None:
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if available)")
    add(
        "--optimise",
        metavar="LIST",
        help=f"a preset ({', '.join(OPTIMISE_PRESETS)}), comma-separated techniques ({', '.join(TECHNIQUES)}), or "
        "a preset followed by techniques; the options below override single fields of it",
    )
    add(
        "--precision",
        action="append",
        choices=PRECISIONS,
        help="default: that of --optimise if passed, else autocast on CUDA and full on a CPU",
    )
    add("--bf16", action="append_const", dest="precision", const="bf16", help="the same as --precision bf16")
    add(
        "--attention",
        choices=IMPLEMENTATIONS,
        help="default: USE_XFORMERS of the environment (True: xformers, False: original), else mha if the config has "
        f"use_native_mha, else {DEFAULT_ATTENTION}",
    )
    add("--sdpa-kernels", metavar="LIST", help=f"kernels allowed in mha and sdpa, of {','.join(SDPA_KERNELS)}")
    for kernel in PUBLISHED_KERNELS:
        add(
            f"--disable_{kernel}",
            action="store_true",
            help=f"forbid this kernel of {', '.join(PUBLISHED_KERNELS)}; also excludes cudnn, which torch 2.0 lacks",
        )
    add("--disable_cudnn", action="store_true", help="forbid the cudnn kernel")
    add(
        "--attention-precision",
        choices=ATTENTION_PRECISIONS,
        help="of QK^T in the original attention (default: ATTN_PRECISION of the environment, fp32 or fp16, which means "
        "input; else fp32)",
    )
    add(
        "--compile",
        nargs="?",
        const="default",
        choices=COMPILE_MODES,
        metavar="MODE",
        help=f"torch.compile the UNet in a mode of {', '.join(COMPILE_MODES)} (without MODE: default)",
    )
    add(
        "--compile-backend",
        choices=COMPILE_BACKENDS,
        metavar="BACKEND",
        help=f"compile the UNet by {', '.join(COMPILE_BACKENDS)} (default: inductor)",
    )
    add(
        "--compile-cache",
        metavar="DIR",
        help="folder that keeps compiled code between processes; torch-compile*.cache in it, of GPU code, work on other machines",
    )
    add("--enable_tf32", action="store_true", help="allow tf32 in matrix products and convolutions (CUDA)")
    add("--skip_first", action="store_true", help="run one iteration first that is neither timed nor saved")
    add("--time_file", metavar="FILE", help="append the seconds of the timed iterations, from prompts to PNG files")


def natural(text: str) -> int:
    """Parse an integer in [0, 2**63), the range of torch's seeds."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 2**63)")
    return value


def seed(text: str) -> int:
    """Parse a seed: an integer in [0, 2**63), or -1 for a random one."""
    return RANDOM_SEED if text == str(RANDOM_SEED) else natural(text)


def chunks(text: str) -> PromptChunks:
    """Parse the number of chunks of a prompt: at least 1, or `auto`."""
    return "auto" if text == "auto" else positive(text)


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    value = natural(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0: must be at least 1")
    return value


def nonnegative(text: str) -> float:
    """Parse a finite number of at least 0."""
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text}: must be a number of at least 0")
    return value


def size(text: str) -> int:
    """Parse a height or width in pixels."""
    value = positive(text)
    try:
        require_size("size", value)
    except ConfigError as error:  # a ValueError, whose message argparse drops
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def lora_file(text: str) -> tuple[Path, float]:
    """Parse FILE[:SCALE]."""
    path, suffix = _file_and_suffix(text)
    try:
        scale = 1.0 if suffix is None else float(suffix)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise argparse.ArgumentTypeError(f"{text}: {suffix!r} after the colon must be a number, the scale")
    return path, scale


def embedding_file(text: str) -> tuple[Path, str | None]:
    """Parse FILE[:TOKEN]."""
    return _file_and_suffix(text)


def _file_and_suffix(text: str) -> tuple[Path, str | None]:
    if Path(text).is_file():  # its name may contain a colon, as on Windows
        return Path(text), None
    file, colon, suffix = text.rpartition(":")
    return (Path(file), suffix) if file and colon else (Path(text), None)


def single(flags: str, values: list[T] | None, default: T) -> T:
    """Return the value of options that may be repeated or spelt in several ways; ConfigError where values differ."""
    distinct = list(dict.fromkeys(values or [default]))
    if len(distinct) > 1:
        raise ConfigError(f"{flags}: {' and '.join(map(str, distinct))} contradict each other; pass one of them")
    return distinct[0]


def prompt_batches(args: Namespace, default: str) -> list[list[str]]:
    """Return the prompts of one iteration in batches of n_samples.

    They are n_samples copies of --prompt, or the lines of --from-file, of which the last batch may be shorter (the
    original scripts fail there). Blank lines are skipped with a warning. Raises ConfigError naming the option.
    """
    for flag, text in (("--prompt", args.prompt), ("--negative-prompt", args.negative_prompt)):
        try:
            (text or "").encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"{flag}: is not UTF-8 text") from None
    if args.from_file is None:
        return [[args.prompt if args.prompt is not None else default] * args.n_samples]
    if args.prompt is not None:
        raise ConfigError("--prompt and --from-file contradict each other: pass one of them")
    try:
        text = Path(args.from_file).read_text(encoding="utf-8-sig")  # Windows editors write a byte order mark
    except OSError as error:
        raise ConfigError(f"--from-file {args.from_file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--from-file {args.from_file}: is not UTF-8 text") from None
    lines = text.removesuffix("\n").split("\n")  # splitlines() also splits at U+2028
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"--from-file {args.from_file}: is empty; write one prompt per line")
    blank = [str(number) for number, line in enumerate(lines, 1) if not line.strip()]
    if blank:
        warnings.warn(
            f"--from-file {args.from_file}: blank lines are skipped: {listed(blank)}", SDWarning, stacklevel=2
        )
    prompts = [prompt for prompt in prompts for _ in range(args.repeat)]
    return [prompts[i : i + args.n_samples] for i in range(0, len(prompts), args.n_samples)]


def check_latents(args: Namespace, config: ModelConfig) -> None:
    """Raise ConfigError where --C or --f contradict the model."""
    for flag, value, expected in (
        ("--C", args.C, config.unet.out_channels),
        ("--f", args.f, config.autoencoder.downsampling),
    ):
        if value not in (None, expected):
            raise ConfigError(f"{flag} {value} contradicts the model {config.name}, which has {expected}: omit it")
