"""The model, device, attention and precision that the options and the environment select.

Options are validated before the weights are read.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from sd.attention.functions import DEFAULT_ATTENTION, Attention
from sd.checkpoint.contents import ASSUMPTION, describe_prediction
from sd.checkpoint.file_formats import require_path
from sd.choices import (
    ATTENTION_PRECISIONS,
    ATTENTION_WITH_KERNELS,
    SDPA_KERNELS,
)
from sd.cli.arguments import PROMPT, PUBLISHED_KERNELS, TINY_PROMPT, single
from sd.config.presets import PRESETS, ModelConfig
from sd.config.yaml_reader import CONFIGS
from sd.cpus import USERS_NUMBER, default_threads
from sd.errors import ConfigError, Unavailable
from sd.networks import resolve_config
from sd.optimise.apply import require_available
from sd.optimise.optimisations import Optimisations
from sd.optimise.presets import parse
from sd.pipeline import StableDiffusion

T = TypeVar("T")


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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f".*{ASSUMPTION}")  # printed below, with the option to change it
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


def set_threads(environ: Mapping[str, str], root: Path = Path("/")) -> str:
    """Set torch's threads unless OMP_NUM_THREADS does; return the line that tells the number and its origin."""
    threads, origin = default_threads(environ, root)
    if origin == USERS_NUMBER:
        return f"CPU threads: {torch.get_num_threads()} ({origin})"
    torch.set_num_threads(threads)
    return f"CPU threads: {threads} ({origin}; {USERS_NUMBER} sets another number)"


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
    if args.compile:
        changes["compile"] = args.compile
    if args.compile_backend:
        changes["compile_backend"] = args.compile_backend
        if not args.compile and not base.compilers():
            changes["compile"] = "default"
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
