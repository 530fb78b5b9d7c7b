"""PNG metadata: the `parameters` text of AUTOMATIC1111's web UI (A1111), and the options that repeat an image from a PNG."""

from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sd import __version__
from sd.choices import MODELS, SAMPLERS
from sd.errors import ConfigError, SDWarning, printable
from sd.optimise.presets import TECHNIQUES

A1111_SAMPLERS = {
    "ddim": "DDIM",
    "plms": "PLMS",
    "dpm_solver": "DPM++ 2M",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
}
# Fields of Optimisations that a PNG records by themselves, apart from `optimisations`.
OWN_KEYS = ("attention", "sdpa_kernels", "attention_precision", "precision", "compile")
SAMPLING = ("--sampler", "--timestep-spacing", "--sigmas")
UNSCHEDULED = ("ddim", "plms")  # of which A1111 has no other timesteps and sigmas
# Options of files that change the model, and their keys in our metadata.
FILES = {"--lora": "lora", "--embedding": "embeddings", "--vae": "vae", "--text-encoder": "text_encoder"}
OTHER_TOOLS = {  # key of the metadata: the tool that writes it
    "workflow": "ComfyUI",
    "invokeai_metadata": "InvokeAI",
    "sd-metadata": "InvokeAI",
    "Dream": "InvokeAI",
}
EMBEDDED = "tiny (embedded)"  # `checkpoint` of the embedded model
# Keys of A1111 that are repeated, or that do not change the image.
REPEATED = (
    "Steps",
    "Sampler",
    "Schedule type",
    "CFG scale",
    "Seed",
    "Size",
    "Model",
    "Eta DDIM",
    "Prompt chunks",
    "RNG",
)
HARMLESS = ("Model hash", "Version", "Hashes")
PARAMETER = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # `name: value, `; a value may be JSON
# Syntax of A1111's prompts: weights, networks and chunks that no other reader means; and emphasis and alternatives.
SYNTAX = re.compile(r"\([^()]*:\s*[\d.]+\)|<\w+:[^<>]*>|\bBREAK\b")
ESCAPED = re.compile(r"\\([()\[\]\\])")  # a bracket that is text in A1111's prompts, or a backslash
ANY_SYNTAX = re.compile(rf"{SYNTAX.pattern}|(?<!\\)(?:\([^()]*\)|\[[^][]*\])|\bAND\b")


def a1111_parameters(text: Mapping[str, object]) -> str:
    """Return the A1111 form of the text chunks of an image: the prompt, the negative prompt, and a line of parameters."""
    sampler = str(text["sampler"])
    checkpoint = str(text["checkpoint"])
    parameters = {
        "Steps": text["steps"],
        "Sampler": A1111_SAMPLERS.get(sampler, sampler),
        "Schedule type": _schedule_type(sampler, text),
        "CFG scale": text["scale"],
        "Seed": text["seed"],
        "Size": text["size"],
        "Model": "tiny" if checkpoint == EMBEDDED else Path(checkpoint).stem,
        "Denoising strength": text.get("strength"),
        "Eta DDIM": text["eta"] or None,
        "RNG": "CPU" if text["rng"] == "per-image" else None,  # A1111's CPU noise has one generator per image too
        "Prompt chunks": text["prompt_chunks"],
        **{key: text.get(key) for key in FILES.values()},
        "Version": f"sd-perf {__version__}",
    }
    prompt, negative = (re.sub(r"[()\[\]\\]", r"\\\g<0>", str(text[key])) for key in ("prompt", "negative_prompt"))
    negative = f"\nNegative prompt: {negative}" if negative else ""
    line = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in parameters.items() if value is not None)
    return f"{prompt}{negative}\n{line}"


def _schedule_type(sampler: str, text: Mapping[str, object]) -> object:
    if text.get("sigmas") == "karras":
        return "Karras"
    uniform = "Uniform" if sampler in A1111_SAMPLERS and sampler not in UNSCHEDULED else None
    return text.get("timestep_spacing", uniform)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


@dataclass(frozen=True)
class Recorded:
    """Settings of an image. options: by flag. execution: those of attention, precision and optimisations, by flag.

    checkpoint: file name, or only its stem, None for the embedded model. config: its preset. machine: device and torch.
    files: those of FILES, by flag. notes: what cannot be repeated.
    """

    options: dict[str, str]
    checkpoint: str | None
    execution: dict[str, str] = field(default_factory=dict)
    config: str | None = None
    machine: tuple[str, str] | None = None
    notes: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


def read(path: str) -> Recorded:
    """Read the metadata of a PNG of txt2img or of A1111. Raises ConfigError where it does not determine the image."""
    from PIL import Image, PngImagePlugin

    try:
        with Image.open(path) as image:
            text = dict(image.text) if isinstance(image, PngImagePlugin.PngImageFile) else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--from-png {path}: cannot be read as an image ({reason})") from None
    if text is None:
        raise ConfigError(f"--from-png {path}: is not a PNG file; other formats do not hold the settings")
    try:
        if {"prompt", "seed", "sampler", "checkpoint"} <= text.keys():
            return _read_ours(text)
        if "parameters" in text:
            return _read_a1111(text["parameters"])
    except (KeyError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"--from-png {path}: {reason}") from None
    if {"seed", "checkpoint"} <= text.keys():
        raise ConfigError(f"--from-png {path}: is a grid; pass an image of the folder samples")
    if tool := next((tool for key, tool in OTHER_TOOLS.items() if key in text), None):
        raise ConfigError(
            f"--from-png {path}: is an image of {tool}, whose settings are not read; pass them as options"
        )
    raise ConfigError(f"--from-png {path}: has no settings of txt2img; an editor may have removed them")


def _read_ours(text: Mapping[str, str]) -> Recorded:
    if "init_img" in text:
        command = "inpaint" if "mask" in text else "depth2img" if "depth" in text else "img2img"
        raise ValueError(f"is an image of {command}, from {text['init_img']}; repeat it with {command}")
    if text["rng"] != "per-image":
        raise ValueError(f"its noise ({text['rng']}) depends on the whole run; repeat the command")
    options = {
        "--prompt": text["prompt"],
        "--negative-prompt": text["negative_prompt"],
        "--seed": text["seed"],
        "--steps": text["steps"],
        "--sampler": text["sampler"],
        **{f"--{key.replace('_', '-')}": text[key] for key in ("timestep_spacing", "sigmas") if key in text},
        "--ddim_eta": text["eta"],
        "--scale": text["scale"],
        "--prompt-chunks": text.get("prompt_chunks", "1"),
        **_size(text["size"]),
    }
    attention = re.fullmatch(r"(\w+)(?: with kernels ([\w,]+))?(?: in (\w+))?", text["attention"])
    if attention is None:
        raise ValueError(f"attention {text['attention']!r} is unknown")
    backend = re.search(r"\bcompile_backend=(\w+)", text["optimisations"])  # an option, and no technique
    techniques, notes = _techniques(re.sub(r"\bcompile_backend=\w+", "", text["optimisations"]))
    execution = {
        "--attention": attention[1],
        "--sdpa-kernels": attention[2],
        "--attention-precision": attention[3],
        "--precision": text["precision"],
        "--compile": None if text["compile"] == "none" else text["compile"],
        "--compile-backend": backend and backend[1],
        "--optimise": ",".join(techniques) or None,
    }
    checkpoint = None if text["checkpoint"] == EMBEDDED else text["checkpoint"]
    return Recorded(
        options,
        checkpoint,
        {flag: value for flag, value in execution.items() if value is not None},
        text["config"] if checkpoint and text["config"] in MODELS else None,
        (text["device"], text["torch"]),
        notes,
        {flag: text[key] for flag, key in FILES.items() if key in text},
    )


def _size(size: str) -> dict[str, str]:
    width, _, height = size.partition("x")
    return {"--W": width, "--H": height}


def _techniques(optimisations: str) -> tuple[list[str], list[str]]:
    """Return the names for --optimise of recorded fields `name=value ...`, and a note for each field without a name."""
    techniques, notes = [], []
    recorded = dict(re.findall(r"(\w+)=(\(.*?\)|\S+)", optimisations))
    known = {t: fields for t, fields in TECHNIQUES.items() if fields.keys() - {*OWN_KEYS} <= recorded.keys()}
    for name, value in recorded.items():
        values = re.findall(r"'(\w+)'", value) if value.startswith("(") else [value]
        for single in values:
            names = [t for t, fields in known.items() if str(fields.get(name)) in (single, f"('{single}',)")]
            techniques += names
            notes += [] if names else [f"{name}={single}"]
    return techniques, notes


def _read_a1111(parameters: str) -> Recorded:
    lines = parameters.strip().split("\n")
    values = dict(PARAMETER.findall(lines[-1]))
    if not {"Steps", "Sampler", "Seed"} <= values.keys():
        raise ValueError("its `parameters` end without Steps, Sampler and Seed")
    values = {key: _unquoted(value.strip()) for key, value in values.items()}
    if "Denoising strength" in values:
        raise ValueError("is an image of img2img or of an upscaler (Denoising strength), which txt2img cannot repeat")
    prompt, *rest = re.split(r"^Negative prompt:", "\n".join(lines[:-1]), maxsplit=1, flags=re.MULTILINE)
    negative = "".join(rest)
    chosen = {
        "--prompt": ESCAPED.sub(r"\1", prompt.strip()),
        "--negative-prompt": ESCAPED.sub(r"\1", negative.strip()),
        "--seed": values["Seed"],
        "--steps": values["Steps"],
        **_sampling(values["Sampler"], values.get("Schedule type")),
        "--scale": values.get("CFG scale"),
        "--ddim_eta": values.get("Eta DDIM"),
        "--prompt-chunks": values.get("Prompt chunks", "auto"),
        **(_size(values["Size"]) if "Size" in values else {}),
    }
    notes = [f"{key}: {value}" for key, value in values.items() if key not in REPEATED + HARMLESS]
    if values.get("RNG") != "CPU":
        notes.append(f"noise of the generator {values.get('RNG', 'GPU')}")
    if not values.get("Version", "").startswith("sd-perf"):
        if chosen["--sampler"] == "dpm_solver" and "--sigmas" not in chosen:
            notes.append(f"timesteps of {values['Sampler']}, which end at 0")
        notes += [f"{match[0]} in the prompt" for match in ANY_SYNTAX.finditer(prompt + negative)]
    checkpoint = None if values.get("Model") == "tiny" else values.get("Model", "unknown")
    return Recorded({flag: value for flag, value in chosen.items() if value is not None}, checkpoint, notes=notes)


def _unquoted(value: str) -> str:
    return str(json.loads(value)) if value.startswith('"') else value


def _sampling(name: str, schedule: str | None) -> dict[str, str]:
    """Return our options, with A1111's name as the sampler where we have none; `--sampler` refuses it."""
    if name.endswith(" Karras"):  # as before A1111 1.9
        name, schedule = name.removesuffix(" Karras"), "Karras"
    ours = next((ours for ours in SAMPLERS if A1111_SAMPLERS.get(ours, ours) == name), None)
    if schedule == "Automatic":
        schedule = "Karras" if ours == "dpm_solver" else "Uniform"
    if ours is None or (ours not in UNSCHEDULED and schedule not in (None, "Uniform", "Karras")):
        return {"--sampler": f"{name} {schedule or ''}".strip()}
    karras = schedule == "Karras" and ours not in UNSCHEDULED
    return {"--sampler": ours, **({"--sigmas": "karras"} if karras else {})}


def files_of(args: Namespace) -> dict[str, str]:
    """Names of the files of options that change the model, by flag."""
    files = {
        "--lora": " ".join(f"{path.name}:{scale:g}" for path, scale in args.lora),
        "--embedding": " ".join(path.name for path, _ in args.embedding),
        "--vae": Path(args.vae or "").name,
        "--text-encoder": Path(args.text_encoder or "").name,
    }
    return {flag: names for flag, names in files.items() if names}


def repeat(parser: ArgumentParser, args: Namespace, argv: Sequence[str]) -> tuple[Namespace, Recorded]:
    """Parse again with the recorded options of --from-png before those of the command line, which replace them.

    Recorded options of execution are left out if the command line has one of them. Raises ConfigError.
    """
    path = args.from_png
    for flag, value in (("--from-file", args.from_file), ("--fixed_code", args.fixed_code)):
        if value:
            raise ConfigError(f"--from-png and {flag} contradict each other: pass one of them")
    recorded = read(path)
    if recorded.checkpoint is not None and args.ckpt is None:
        raise ConfigError(f"--from-png {path}: was generated with {recorded.checkpoint}: pass it with --ckpt")
    files = files_of(args)
    for flag, names in recorded.files.items():
        if flag not in files:
            raise ConfigError(f"--from-png {path}: was generated with {names}: pass it with {flag}")
        if files[flag] != names:
            _warn(f"--from-png {path}: was generated with {flag} {names}, not with {files[flag]}")
    disabled = [name for name in vars(args) if name.startswith("disable_") and getattr(args, name)]
    chosen = [args.attention, args.sdpa_kernels, args.attention_precision, args.precision]
    chosen += [args.compile, args.compile_backend]
    options = {**recorded.options, **({} if any([*chosen, args.optimise, *disabled]) else recorded.execution)}
    if args.sampler:  # appended to, not replaced; the rest is of the recorded sampler
        options = {flag: value for flag, value in options.items() if flag not in SAMPLING}
    if recorded.config and args.config is None:
        options["--config"] = recorded.config
    flags = [f"{flag}={value}" for flag, value in options.items()]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parser.parse_args(flags)
    except SystemExit:
        reason = errors.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise ConfigError(f"--from-png {path}: {reason}") from None
    for note in recorded.notes:
        _warn(f"--from-png {path}: not repeated: {note}")
    given = Path(args.ckpt).name if args.ckpt else None
    if given is not None and recorded.checkpoint not in (given, Path(given).stem):
        _warn(f"--from-png {path}: was generated with {recorded.checkpoint or EMBEDDED}, not with {given}")
    return parser.parse_args([*flags, *argv]), recorded


def warn_of_syntax(prompts: Iterable[str]) -> None:
    """Warn of syntax of A1111 in prompts, which the text encoder gets as it is."""
    if parts := list(dict.fromkeys(match[0] for prompt in prompts for match in SYNTAX.finditer(prompt))):
        _warn(f"prompt: {', '.join(parts[:5])}: is used as text, unlike in A1111; for LoRA pass --lora FILE")


def warn_of_other_machine(recorded: Recorded, device: torch.device) -> None:
    """Warn where another device or torch generated the image, whose rounding differs."""
    here = (device.type, torch.__version__)
    if recorded.machine not in (None, here):
        _warn(f"generated on {' with torch '.join(recorded.machine or here)}: rounding may differ here")


def _warn(message: str) -> None:
    warnings.warn(printable(message), SDWarning, stacklevel=3)
