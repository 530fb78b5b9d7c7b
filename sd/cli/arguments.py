"""Options shared by the commands that generate images, and the model, device, attention, precision and prompts they select.

Options are validated before the weights are read.
"""

from __future__ import annotations

import argparse
import math
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from sd import __version__
from sd.attention.functions import DEFAULT_ATTENTION, Attention
from sd.checkpoint.contents import describe_prediction
from sd.checkpoint.file_formats import require_path
from sd.choices import ATTENTION as IMPLEMENTATIONS
from sd.choices import (
    ATTENTION_PRECISIONS,
    ATTENTION_WITH_KERNELS,
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
from sd.cli.threads import set_threads
from sd.config.presets import PRESETS, ModelConfig
from sd.config.yaml_reader import CONFIGS
from sd.errors import ConfigError, SDWarning, Unavailable, listed
from sd.images import require_size
from sd.optimise.apply import require_available
from sd.optimise.optimisations import Optimisations
from sd.optimise.presets import TECHNIQUES, parse
from sd.pipeline import StableDiffusion, resolve_config
from sd.prompts import PromptChunks

PROMPT = "a professional photograph of an astronaut riding a triceratops"  # of the original scripts
TINY_PROMPT = "a red circle on a blue background"
RANDOM_SEED = -1  # of --seed, as in AUTOMATIC1111's web UI
PUBLISHED_KERNELS = ("math", "mem_efficient", "flash")  # of torch 2.0, to which the published --disable flags refer

T = TypeVar("T")


def add_options(parser: argparse.ArgumentParser, outdir: str, refused: Mapping[str, str]) -> None:
    """Add the options that both commands have, and those that the command refuses (flag -> reason)."""
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
        help="folder that keeps compiled code between processes; torch-compile.cache in it works on other machines",
    )
    add(
        "--aot",
        metavar="FILE.pt2",
        help="the UNet compiled ahead of time, for one batch and image size; written at the first image if missing",
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


@dataclass(frozen=True)
class Setup:
    """Model, device and optimisations selected by the options and the environment.

    checkpoint: None for the embedded model. config: None to detect it from the weights. loras: files and scales.
    embeddings: files and tokens, None for the file's own. vae, text_encoder: files or folders that replace these
    networks of the checkpoint.
    """

    checkpoint: Path | None
    config: ModelConfig | None
    device: torch.device
    optimisations: Optimisations
    loras: tuple[tuple[Path, float], ...] = ()
    embeddings: tuple[tuple[Path, str | None], ...] = ()
    vae: str | None = None
    text_encoder: str | None = None
    ignore_unknown_keys: bool = False

    @property
    def default_prompt(self) -> str:
        """Prompt where none is passed."""
        return TINY_PROMPT if self.checkpoint is None else PROMPT

    def load(self) -> StableDiffusion:
        """Load the model with its LoRA and embeddings; prints a detected config and prediction type."""
        # Some optimisations make the weights constants, so that LoRA comes first.
        merges = Optimisations(precision=self.optimisations.precision) if self.loras else self.optimisations
        model = self._load(merges)
        for path, scale in self.loras:
            model.load_lora(path, scale)
        for path, token in self.embeddings:
            print(f"{path.name}: write {model.load_embedding(path, token)!r} in the prompt")
        if self.loras:
            model.optimise(self.optimisations)
        return model

    def _load(self, optimisations: Optimisations) -> StableDiffusion:
        if self.checkpoint is None:
            inpainting = self.config is not None and self.config.inpainting
            return StableDiffusion.tiny(self.device, optimisations, inpainting)
        model = StableDiffusion.from_checkpoint(
            self.checkpoint,
            self.config,
            self.device,
            optimisations,
            vae=self.vae,
            text_encoder=self.text_encoder,
            ignore_unknown_keys=self.ignore_unknown_keys,
        )
        if self.config is None:
            print(f"no --config: by the sizes of its weights, {self.checkpoint} is {model.config.name}")
            print(describe_prediction(self.checkpoint, model.config))
        return model


def setup(args: Namespace, environ: Mapping[str, str]) -> Setup:
    """Select model, device and optimisations without reading weights. Raises ConfigError or Unavailable."""
    if args.refused:
        raise ConfigError(args.refused[0])
    device = device_named(args.device)
    if device.type == "cpu":
        print(set_threads(environ))
    config = None if args.config is None else _config(args.config)
    for option in ("ckpt", "vae", "text_encoder"):
        if getattr(args, option) is not None:
            require_path(getattr(args, option))  # rejects "" and addresses before the weights are read
    if args.ckpt is None:
        if args.vae is not None or args.text_encoder is not None:
            raise ConfigError("--vae and --text-encoder replace networks of a checkpoint: pass --ckpt FILE")
        if args.embedded is None:
            raise ConfigError("no --ckpt: no model of this command is embedded; pass --ckpt FILE")
        if config is not None and not _is_tiny(config):
            raise ConfigError(
                f"--config {args.config} needs its checkpoint: pass --ckpt FILE, or neither for the tiny model"
            )
        print("no --ckpt: using the embedded tiny model of coloured shapes; pass --ckpt FILE for another")
        config = config or PRESETS[args.embedded]
    optimisations = choose_optimisations(args, environ, device, config is not None and config.native_mha)
    require_available(optimisations, device)
    for flag, files in (("--lora", args.lora), ("--embedding", args.embedding)):
        missing = [path for path, _ in files if not path.is_file()]
        if missing:
            raise ConfigError(f"{flag} {missing[0]}: no such file")
    return Setup(
        Path(args.ckpt) if args.ckpt is not None else None,
        config,
        device,
        optimisations,
        tuple(args.lora),
        tuple(args.embedding),
        args.vae,
        args.text_encoder,
        args.ignore_unknown_keys,
    )


def _config(value: str) -> ModelConfig | None:
    packaged = CONFIGS / Path(value).name
    if value.endswith((".yaml", ".yml")) and not Path(value).exists() and packaged.is_file():
        print(f"no file {value}: using the packaged {packaged.name}")
        return resolve_config(packaged)
    return resolve_config(value)


def _is_tiny(config: ModelConfig) -> bool:
    tiny = PRESETS["tiny-inpaint" if config.inpainting else "tiny"]
    return replace(config, name=tiny.name, text=replace(config.text, layers=tiny.text.layers), native_mha=False) == tiny


def device_named(name: str) -> torch.device:
    """The device of --device, made the current one. Raises ConfigError or Unavailable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: choose cpu, cuda, cuda:N or auto")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise Unavailable(f"--device {name}: this machine has {count} CUDA devices; use --device cpu or auto")
        torch.cuda.set_device(device.index or 0)  # timing events belong to the current device
    return device


def choose_optimisations(
    args: Namespace, environ: Mapping[str, str], device: torch.device, native_mha: bool
) -> Optimisations:
    """Combine --optimise with the single options over it. Raises ConfigError where they contradict each other."""
    narrow = args.ckpt is None  # an embedded model
    if args.optimise is None:
        base = Optimisations(precision="autocast" if device.type == "cuda" else "full")
    else:
        base = parse(args.optimise, device, narrow=narrow)
    changes: dict[str, Any] = {}
    if args.optimise is None or _selects_attention(args, environ, native_mha):
        attention = choose_attention(args, environ, native_mha, base.attention)
        changes.update(
            attention=attention.implementation,
            sdpa_kernels=attention.kernels,
            attention_precision=attention.precision,
        )
    if args.precision:
        changes["precision"] = single("--precision", args.precision, None)
    if args.compile or args.aot:
        changes["compile"] = args.compile or "none"
    if args.compile_backend:
        changes["compile_backend"] = args.compile_backend
        if not args.compile and not base.compilers():
            changes["compile"] = "default"
    if args.aot:
        changes["aot"] = args.aot
    if args.enable_tf32:
        if device.type != "cuda":
            raise Unavailable(f"--enable_tf32: tf32 is a mode of NVIDIA GPUs, and the device is {device}: leave it out")
        changes["tf32"] = True
    return replace(base, **changes) if args.optimise is None else parse(args.optimise, device, changes, narrow)


def _selects_attention(args: Namespace, environ: Mapping[str, str], native_mha: bool) -> bool:
    options = [args.attention, args.sdpa_kernels, args.attention_precision, *_disabled_kernels(args)]
    return any(options) or native_mha or bool(environ.get("USE_XFORMERS") or environ.get("ATTN_PRECISION"))


def _disabled_kernels(args: Namespace) -> list[str]:
    return [kernel for kernel in SDPA_KERNELS if getattr(args, f"disable_{kernel}")]


def choose_attention(
    args: Namespace, environ: Mapping[str, str], native_mha: bool, default: str = DEFAULT_ATTENTION
) -> Attention:
    """Select the attention by the options, the environment, the config, or the default, in this order.

    Installed packages never decide. Raises ConfigError where two of the sources contradict each other.
    """
    use_xformers = _environment(environ, "USE_XFORMERS", {"true": True, "1": True, "false": False, "0": False})
    if args.attention:
        implementation = args.attention
    elif native_mha:
        if use_xformers:
            raise ConfigError("USE_XFORMERS=True contradicts the config's use_native_mha: unset it or pass --attention")
        implementation = "mha"
    elif use_xformers is not None:
        implementation = "xformers" if use_xformers else "original"
    else:
        implementation = default

    precision = args.attention_precision
    if precision and implementation != "original":
        raise ConfigError(f"--attention-precision: attention {implementation} has none; pass --attention original")
    precision = precision or _environment(environ, "ATTN_PRECISION", {"fp32": "fp32", "fp16": "input"})
    return Attention(implementation, _kernels(args, implementation), precision or ATTENTION_PRECISIONS[0])


def _kernels(args: Namespace, implementation: str) -> tuple[str, ...]:
    disabled = _disabled_kernels(args)
    flags = " ".join(f"--disable_{kernel}" for kernel in disabled)
    if (disabled or args.sdpa_kernels) and implementation not in ATTENTION_WITH_KERNELS:
        options = flags or f"--sdpa-kernels {args.sdpa_kernels}"
        raise ConfigError(f"{options}: attention {implementation} has no SDPA kernels; pass --attention mha or sdpa")
    if disabled and args.sdpa_kernels:
        raise ConfigError(f"{flags} and --sdpa-kernels contradict each other: pass one of them")
    if args.sdpa_kernels:
        return tuple(args.sdpa_kernels.split(","))
    candidates = PUBLISHED_KERNELS if set(disabled) & set(PUBLISHED_KERNELS) else SDPA_KERNELS
    kernels = tuple(kernel for kernel in candidates if kernel not in disabled)
    if not kernels:
        raise ConfigError(f"{flags} leave no kernel: omit one, or allow one with --sdpa-kernels cudnn")
    return kernels


def _environment(environ: Mapping[str, str], name: str, values: Mapping[str, T]) -> T | None:
    value = environ.get(name)
    if not value:
        return None
    if value.lower() not in values:
        raise ConfigError(f"{name}={value} in the environment: choose {' or '.join(values)}, or unset it")
    return values[value.lower()]


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
