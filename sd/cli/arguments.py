"""The options that txt2img and img2img share, and what they choose: model, device, attention, precision, prompts.

Options are checked before the weights are read, so that a mistake costs no minutes.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sd.attention.functions import DEFAULT_ATTENTION
from sd.choices import ATTENTION as IMPLEMENTATIONS
from sd.choices import ATTENTION_PRECISIONS, COMPILE_MODES, PRECISIONS, RNGS, SDPA_KERNELS
from sd.choices import PRESETS as PRESET_NAMES
from sd.config.presets import PRESETS, ModelConfig
from sd.config.yaml_reader import CONFIGS
from sd.errors import ConfigError, Unavailable
from sd.optimise import presets as techniques
from sd.optimise.apply import require_available
from sd.optimise.optimisations import Optimisations
from sd.pipeline import StableDiffusion, resolve_config

PROMPT = "a professional photograph of an astronaut riding a triceratops"  # the original's
TINY_PROMPT = "a red circle on a blue background"
# torch 2.0, which the three published --disable flags are about, had these kernels and no others.
PUBLISHED_KERNELS = ("math", "mem_efficient", "flash")


def add_options(parser: argparse.ArgumentParser, outdir: str) -> None:
    """The options that both commands have."""
    _add_task(parser.add_argument, outdir)
    _add_model(parser.add_argument_group("model").add_argument)
    _add_run(parser.add_argument_group("how it is run").add_argument)


def _add_task(add, outdir: str) -> None:
    add("--prompt", help=f"what to draw (default: {PROMPT!r}; of the tiny model {TINY_PROMPT!r})")
    add("--negative-prompt", default="", help="what not to draw")
    add("--from-file", metavar="FILE", help="one prompt a line, drawn --n_samples at a time, instead of --prompt")
    add("--repeat", type=positive, default=1, help="use each prompt of --from-file this often (default: 1)")
    add("--outdir", default=outdir, help="where samples/NNNNN.png and grid-NNNN.png go (default: %(default)s)")
    add("--skip_save", action="store_true", help="save no single pictures")
    add("--skip_grid", action="store_true", help="save no grid of them")
    add("--n_rows", type=natural, default=0, help="pictures in a row of the grid (default: --n_samples)")
    add("--n_iter", type=positive, default=1, help="sample this often (default: 1; the original scripts: 2 and 3)")
    add("--n_samples", type=positive, default=1, help="pictures at a time (default: 1; the original scripts: 3)")
    add("--steps", "--ddim_steps", type=positive, default=50, help="sampling steps (default: 50)")
    add("--ddim_eta", type=float, default=0.0, help="0 is deterministic, 1 ancestral sampling; DDIM only (default: 0)")
    add("--seed", type=natural, default=42, help="picture k of all has seed + k (default: 42)")
    add(
        "--rng",
        choices=RNGS,
        default="per-image",
        help="per-image: a picture's noise depends on its seed alone; original: one draw for a whole batch on the "
        "device, as in the original scripts (default: per-image)",
    )


def _add_model(add) -> None:
    add("--ckpt", metavar="FILE", help=".ckpt, .safetensors or diffusers folder (default: the embedded tiny model)")
    add(
        "--config",
        help=f"a preset ({', '.join(PRESETS)}) or a YAML file in the original layout (default: by the weights' sizes; "
        "SD2 weights are then taken to predict eps: give sd2-v for the others)",
    )
    add("--C", type=positive, help="latent channels: those of the model, or an error")
    add("--f", type=positive, help="pixels per latent cell: those of the model, or an error")


def _add_run(add) -> None:
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add(
        "--optimise",
        metavar="LIST",
        help=f"a preset ({', '.join(PRESET_NAMES)}), techniques with commas between "
        f"({', '.join(techniques.TECHNIQUES)}), or both; other options here change single things in it",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        help="default: that of --optimise if it is given, else autocast on CUDA and full on a CPU",
    )
    add("--bf16", action="store_true", help="the same as --precision bf16")
    add(
        "--attention",
        choices=IMPLEMENTATIONS,
        help="default: USE_XFORMERS of the environment (True: xformers, False: original), else mha where the config "
        f"says use_native_mha, else {DEFAULT_ATTENTION}",
    )
    add("--sdpa-kernels", metavar="LIST", help=f"kernels allowed in mha and sdpa, of {','.join(SDPA_KERNELS)}")
    for kernel in PUBLISHED_KERNELS:
        add(
            f"--disable_{kernel}",
            action="store_true",
            help=f"of {', '.join(PUBLISHED_KERNELS)}, the kernels of torch 2.0, do not allow this one; cudnn, which is "
            "younger, is then left out too",
        )
    add("--disable_cudnn", action="store_true", help="do not allow the cudnn kernel")
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
        help=f"torch.compile the UNet in one of the modes {', '.join(COMPILE_MODES)} (without MODE: default)",
    )
    add(
        "--compile-cache",
        metavar="DIR",
        help="keep what was compiled here, and start from it; its torch-compile.cache can be taken to another machine",
    )
    add(
        "--aot",
        metavar="FILE.pt2",
        help="the UNet compiled ahead of time, for one batch and size; written at the first picture if there is none",
    )
    add("--enable_tf32", action="store_true", help="let matrix products and convolutions round to tf32 (CUDA)")
    add("--skip_first", action="store_true", help="one more iteration, before the others, neither timed nor saved")
    add("--time_file", metavar="FILE", help="append a line: seconds of the timed iterations, from prompts to PNGs")


def natural(text: str) -> int:
    """argparse type: a whole number from 0 to what torch takes as a seed."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 2**63)")
    return value


def positive(text: str) -> int:
    """argparse type: a whole number from 1."""
    value = natural(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 is too few: at least 1")
    return value


@dataclass(frozen=True)
class Setup:
    """What to load and how to run it, as the options and the environment say; config None is left to the weights."""

    checkpoint: Path | None
    config: ModelConfig | None
    device: torch.device
    optimisations: Optimisations

    @property
    def default_prompt(self) -> str:
        """What is drawn when no prompt is given."""
        return TINY_PROMPT if self.checkpoint is None else PROMPT

    def load(self) -> StableDiffusion:
        """The model; says what it took where the options left it open."""
        if self.checkpoint is None:
            model = StableDiffusion.tiny(self.device, self.optimisations)
        else:
            model = StableDiffusion.from_checkpoint(self.checkpoint, self.config, self.device, self.optimisations)
        if self.config is None:
            print(f"no --config: by the sizes of its weights, {self.checkpoint} is {model.config.name}")
            if model.config.name == "sd2":
                print("taken to predict eps: if its pictures are noise, it predicts v, so give --config sd2-v")
        return model


def setup(args, environ) -> Setup:
    """Choose model, device and optimisations; no weights are read. Raises ConfigError or Unavailable."""
    config, said = _config(args.config)
    if args.ckpt is None:
        if config is not None and not _is_tiny(config):
            raise ConfigError(
                f"--config {args.config} needs its checkpoint: give --ckpt FILE, or leave both out for tiny"
            )
        said = [
            "no --ckpt: this is the embedded tiny model of coloured shapes; --ckpt FILE gives a real one",
            *said,
        ]
        config = config or PRESETS["tiny"]
    for line in said:
        print(line)
    device = _device(args.device)
    optimisations = choose_optimisations(args, environ, device, config is not None and config.native_mha)
    require_available(optimisations, device)
    return Setup(Path(args.ckpt) if args.ckpt is not None else None, config, device, optimisations)


def _config(value: str | None) -> tuple[ModelConfig | None, list[str]]:
    if value is None:
        return None, []
    packaged = CONFIGS / Path(value).name
    if value.endswith((".yaml", ".yml")) and not Path(value).exists() and packaged.is_file():
        return resolve_config(packaged), [f"no file {value}: using the {packaged.name} that comes with this package"]
    return resolve_config(value), []


def _is_tiny(config: ModelConfig) -> bool:
    tiny = PRESETS["tiny"]
    return replace(config, name=tiny.name, text=replace(config.text, layers=tiny.text.layers), native_mha=False) == tiny


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: choose cpu, cuda, cuda:N or auto")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise Unavailable(f"--device {name}: there are {count} CUDA devices here; use --device cpu or auto")
        torch.cuda.set_device(device.index or 0)  # timing events are of the current device
    return device


def choose_optimisations(args, environ, device: torch.device, native_mha: bool) -> Optimisations:
    """What --optimise says, and the single options over it. Raises ConfigError where they contradict each other."""
    if args.optimise is None:
        base = Optimisations(precision="autocast" if device.type == "cuda" else "full")
    else:
        base = techniques.parse(args.optimise, device)
    changes = {}
    if args.optimise is None or _names_attention(args, environ, native_mha):
        names = ("attention", "sdpa_kernels", "attention_precision")
        changes = dict(zip(names, choose_attention(args, environ, native_mha, base.attention)))
    if args.bf16 and args.precision not in (None, "bf16"):
        raise ConfigError(f"--bf16 contradicts --precision {args.precision}: give one of the two")
    if args.bf16 or args.precision:
        changes["precision"] = "bf16" if args.bf16 else args.precision
    if args.compile:
        changes["compile"] = args.compile
    if args.aot:
        changes["aot"] = args.aot
        changes.setdefault("compile", "none")
    if args.enable_tf32:
        if device.type != "cuda":
            raise Unavailable(f"--enable_tf32: tf32 is a mode of NVIDIA GPUs, and the device is {device}: leave it out")
        changes["tf32"] = True
    return replace(base, **changes) if args.optimise is None else techniques.parse(args.optimise, device, changes)


def _names_attention(args, environ, native_mha: bool) -> bool:
    """Whether an option, the environment or the config says anything of attention."""
    options = [args.attention, args.sdpa_kernels, args.attention_precision]
    options += [getattr(args, f"disable_{kernel}") for kernel in SDPA_KERNELS]
    return any(options) or native_mha or bool(environ.get("USE_XFORMERS") or environ.get("ATTN_PRECISION"))


def choose_attention(
    args, environ, native_mha: bool, default: str = DEFAULT_ATTENTION
) -> tuple[str, tuple[str, ...], str]:
    """(implementation, SDPA kernels, attention precision): by the options, the environment, the config, or the default.

    What can be imported never decides. Raises ConfigError where two of them contradict each other.
    """
    use_xformers = _environment(environ, "USE_XFORMERS", {"true": True, "1": True, "false": False, "0": False})
    if args.attention:
        implementation = args.attention
    elif native_mha:
        if use_xformers:
            raise ConfigError("USE_XFORMERS=True contradicts the config's use_native_mha: unset it or say --attention")
        implementation = "mha"
    elif use_xformers is not None:
        implementation = "xformers" if use_xformers else "original"
    else:
        implementation = default

    disabled = [kernel for kernel in SDPA_KERNELS if getattr(args, f"disable_{kernel}")]
    flags = " ".join(f"--disable_{kernel}" for kernel in disabled)
    if (disabled or args.sdpa_kernels) and implementation not in ("mha", "sdpa"):
        asked = flags or f"--sdpa-kernels {args.sdpa_kernels}"
        raise ConfigError(f"{asked}: attention {implementation} has no SDPA kernels; say --attention mha or sdpa")
    if disabled and args.sdpa_kernels:
        raise ConfigError(f"{flags} and --sdpa-kernels contradict each other: give one of the two")
    kernels = tuple(args.sdpa_kernels.split(",")) if args.sdpa_kernels else SDPA_KERNELS
    if disabled:
        candidates = PUBLISHED_KERNELS if set(disabled) & set(PUBLISHED_KERNELS) else SDPA_KERNELS
        kernels = tuple(kernel for kernel in candidates if kernel not in disabled)
        if not kernels:
            raise ConfigError(f"{flags} leave no kernel: leave one out, or allow one with --sdpa-kernels cudnn")

    precision = args.attention_precision
    if precision and implementation != "original":
        raise ConfigError(f"--attention-precision: attention {implementation} has none; say --attention original")
    from_environment = _environment(environ, "ATTN_PRECISION", {"fp32": "fp32", "fp16": "input"})
    return implementation, kernels, precision or from_environment or ATTENTION_PRECISIONS[0]


def _environment(environ, name: str, values: dict):
    value = environ.get(name)
    if not value:
        return None
    if value.lower() not in values:
        raise ConfigError(f"{name}={value} in the environment: choose {' or '.join(values)}, or unset it")
    return values[value.lower()]


def prompt_batches(args, default: str) -> list[list[str]]:
    """The prompts of one iteration: n_samples copies of one, or those of --from-file in batches of n_samples.

    The last batch may be shorter; the original scripts die of it.
    """
    for flag, text in (("--prompt", args.prompt), ("--negative-prompt", args.negative_prompt)):
        try:
            (text or "").encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"{flag}: is not UTF-8 text") from None
    if args.from_file is None:
        return [[args.prompt if args.prompt is not None else default] * args.n_samples]
    if args.prompt is not None:
        raise ConfigError("--prompt and --from-file contradict each other: give one of the two")
    try:
        text = Path(args.from_file).read_text(encoding="utf-8-sig")  # some editors put a mark of UTF-8 in front
    except OSError as error:
        raise ConfigError(f"--from-file {args.from_file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--from-file {args.from_file}: is not UTF-8 text") from None
    lines = text.removesuffix("\n").split("\n") if text else []  # not splitlines, which also splits at U+2028
    if not lines:
        raise ConfigError(f"--from-file {args.from_file}: holds no prompt; write one a line")
    prompts = [line for line in lines for _ in range(args.repeat)]
    return [prompts[i : i + args.n_samples] for i in range(0, len(prompts), args.n_samples)]


def check_numbers(args) -> None:
    """Refuse numbers that no model can use. Raises ConfigError naming the option."""
    for flag, value in (("--scale", args.scale), ("--ddim_eta", args.ddim_eta)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{flag} {value}: must be a number of at least 0")


def check_latents(args, config: ModelConfig) -> None:
    """Refuse --C and --f where they contradict the model. Raises ConfigError."""
    for flag, value, own in (
        ("--C", args.C, config.unet.in_channels),
        ("--f", args.f, config.autoencoder.downsampling),
    ):
        if value not in (None, own):
            raise ConfigError(f"{flag} {value} contradicts the model {config.name}, which has {own}: leave it out")


def append_seconds(path, line: str) -> None:
    """Append `line` to the --time_file `path`. Raises ConfigError where that cannot be done."""
    try:
        with open(path, "a") as file:
            file.write(line)
    except OSError as error:
        raise ConfigError(f"--time_file {path}: cannot be written ({error.strerror})") from None
