"""Checkpoints in the folder layout of diffusers: one subfolder for each network, with its config.json.

Weights are .safetensors or .bin files, whole or in shards that an index lists, with or without a variant such as fp16 in
their names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd.checkpoint import layouts
from sd.checkpoint.diffusers_folder import SCHEDULERS, WEIGHT_FILES
from sd.checkpoint.file_formats import FileIndex, index, read_tensors
from sd.config.presets import ModelConfig, Parameterization, TextKind
from sd.errors import CheckpointError, listed
from sd.sampling.samplers import SAMPLERS

Reader = Callable[[FileIndex, Iterable[str], "bool | None"], layouts.State]
PREDICTION_TYPES: dict[str, Parameterization] = {"epsilon": "eps", "v_prediction": "v"}
SCHEDULER = "scheduler/scheduler_config.json"
# Values, with which `sd` samples, of settings that change the steps, and below them the defaults of diffusers, by sampler,
# where these are others.
_STEP_SETTINGS: dict[str, Any] = {
    "thresholding": False,
    "trained_betas": None,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "use_lu_lambdas": False,
    "euler_at_final": False,
    "lower_order_final": True,
    "predict_x0": True,
    "clip_sample": False,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ddim": {"clip_sample": True, "set_alpha_to_one": True},
    "plms": {"skip_prk_steps": False},
    "dpm_solver": {"final_sigmas_type": "zero"},
}
_OTHER_FRAMEWORKS = (".onnx", ".msgpack", ".h5", ".xml", ".mlmodelc", ".engine")
SHARDS = 1000  # the highest number of shards of a network that is read


def _weight_files(folder: Path, network: str) -> list[Path]:
    """Files of a network's weights: whole before sharded, .safetensors before .bin, and variants such as fp16 last."""
    stem = WEIGHT_FILES[network][1]
    old = "pytorch_model" if stem == "model" else stem  # transformers names its .bin files differently
    for name, suffix in ((stem, "safetensors"), (old, "bin")):
        if (folder / f"{name}.{suffix}").is_file():
            return [folder / f"{name}.{suffix}"]
    for name, suffix in ((stem, "safetensors"), (old, "bin")):
        if (folder / f"{name}.{suffix}.index.json").is_file():
            return _shards(folder, f"{name}.{suffix}.index.json")
    for name, suffix in ((stem, "safetensors"), (old, "bin")):
        files = [path for path in folder.glob(f"{name}.*.{suffix}") if "-of-" not in path.name]
        variants = sorted(files, key=lambda path: (".fp16." not in path.name, path.name))
        if variants:
            return variants[:1]
        if indices := sorted(folder.glob(f"{name}.{suffix}.index.*.json")):
            return _shards(folder, indices[0].name)
    return []


def _shards(folder: Path, index_name: str) -> list[Path]:
    table = _config(folder, index_name).get("weight_map")
    names = sorted(set(table.values()) if isinstance(table, dict) and all(map(_is_text, table.values())) else ())
    if not 0 < len(names) <= SHARDS:
        raise CheckpointError(f"{folder / index_name}: lists no shards of the weights; download the folder again")
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder / index_name}: its shard {name!r} is missing; download the folder again")
    return [folder / name for name in names]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _index_network(folder: Path, network: str) -> list[FileIndex]:
    name, stem = WEIGHT_FILES[network]
    files = _weight_files(folder / name, network)
    if not files:
        option = {"autoencoder": ", or pass --vae FILE", "text_encoder": ", or pass --text-encoder FILE"}.get(
            network, ""
        )
        raise CheckpointError(
            f"{folder}: is no diffusers folder of a whole model, {name}/{stem}.safetensors is missing; "
            + (
                _instead(folder, name)
                or f"give a folder with unet, vae and text_encoder in it, or a single file{option}"
            )
        )
    return [index(file) for file in files]


def _instead(folder: Path, network: str) -> str | None:
    """Advice from what a folder contains in place of a network's weights."""
    if any((folder / "snapshots").glob("*/")):
        return f"give a folder in {folder / 'snapshots'}, since this is one of the cache of Hugging Face"
    if (folder / "config.json").is_file():
        return "give the folder around it, since this is the folder of one network"
    other = sorted(path.name for path in (folder / network).glob("*") if path.suffix in _OTHER_FRAMEWORKS)
    if other:
        return f"give weights of PyTorch, since {network}/{other[0]} is of another framework"
    files = sorted(path.name for path in folder.glob("*") if path.suffix in (".ckpt", ".safetensors"))
    return f"give one of its files: {listed(files)}" if files else None


def read_folder(
    folder: Path,
    progress: bool | None = None,
    networks: Iterable[str] = tuple(WEIGHT_FILES),
    strict: bool = True,
    read: Reader = read_tensors,
) -> layouts.State:
    """Read the weights of a diffusers folder in the original layout. Raises CheckpointError naming a missing file.

    networks: those to read. strict False: unknown names are left unchanged. read: reads the tensors of an index.
    """
    if (folder / "text_encoder_2").is_dir():
        raise CheckpointError(f"{folder}: is a Stable Diffusion XL model; only Stable Diffusion 1 and 2 can be loaded")
    indices = {network: _index_network(folder, network) for network in networks}  # all, before tensors are read
    states = {network: _read_shards(parts, progress, read) for network, parts in indices.items()}
    try:
        return _to_original(states, folder, strict)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def _read_shards(parts: list[FileIndex], progress: bool | None, read: Reader) -> layouts.State:
    state: layouts.State = {}
    for part in parts:
        state.update(read(part, part.tensors, progress))
    return state


def _to_original(states: dict[str, layouts.State], folder: Path, strict: bool) -> layouts.State:
    result: layouts.State = {}
    linear = False  # SD1 projects with 1x1 convolutions, SD2 with matrices
    if "unet" in states:
        unet = layouts.unet_from_diffusers(states.pop("unet"), strict)
        linear = any(name.endswith(".proj_in.weight") and weight.dim() == 2 for name, weight in unet.items())
        result.update(layouts.add_prefix(unet, layouts.UNET))
    if "autoencoder" in states:
        autoencoder = layouts.autoencoder_from_diffusers(states.pop("autoencoder"), strict)
        result.update(layouts.add_prefix(autoencoder, layouts.AUTOENCODER))
    if "text_encoder" in states:
        text = states.pop("text_encoder")
        for name in ("text_model.embeddings.position_ids", "embeddings.position_ids"):
            text.pop(name, None)
        openclip = layouts.hf_text_to_openclip(text)
        kind = _text_kind(folder) or ("openclip" if linear else "clip")
        result.update(
            layouts.add_prefix(openclip, layouts.OPENCLIP)
            if kind == "openclip"
            else layouts.add_prefix(layouts.openclip_text_to_hf(openclip), layouts.CLIP)
        )
    return result


def read_network(
    folder: Path, network: str, progress: bool | None = None, strict: bool = True, read: Reader = read_tensors
) -> layouts.State:
    """Read `autoencoder` or `text_encoder` from the folder of a whole model, or from its own folder, in the original layout."""
    name = WEIGHT_FILES[network][0]
    files = _weight_files(folder, network) or _weight_files(folder / name, network)
    if not files:
        noun = network.replace("_", " ")
        raise CheckpointError(f"{folder}: contains no {noun}, in it or in {name}; give another folder, or a file")
    state = _read_shards([index(file) for file in files], progress, read)
    try:
        return _to_original({network: state}, folder, strict)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def image_size(folder: Path) -> int | None:
    """Native height and width in pixels, from the settings of the UNet; None if absent."""
    cells = _config(folder, "unet/config.json").get("sample_size")
    return 8 * cells if type(cells) is int and 8 <= cells <= 1024 and cells % 8 == 0 else None


def _config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{path}: is no readable JSON; download the folder again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: contains no settings; download the folder again")
    return config


def _text_kind(folder: Path) -> TextKind | None:
    activations: dict[str, TextKind] = {"quick_gelu": "clip", "gelu": "openclip"}
    config = _config(folder, "text_encoder/config.json") or _config(folder, "config.json")
    return activations.get(str(config.get("hidden_act")))


def parameterization(folder: Path) -> Parameterization | None:
    """Prediction type in the folder's scheduler settings: eps, v, or None if absent."""
    value = _config(folder, SCHEDULER).get("prediction_type")
    if value is not None and str(value) not in PREDICTION_TYPES:
        raise _unsupported(folder / SCHEDULER, "prediction_type", value, " and ".join(PREDICTION_TYPES))
    return PREDICTION_TYPES.get(str(value))


@dataclass(frozen=True)
class RecordedScheduler:
    """Scheduler that a folder names. options: of the command lines for its steps, None if no sampler takes them.

    differences: its settings that have another value in that sampler.
    """

    name: str
    options: str | None = None
    differences: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.options is None:
            return f"{self.name}, which no sampler here equals"
        return f"{self.name}: {self.options}" + (
            f", without its {', '.join(self.differences)}" * bool(self.differences)
        )


def recorded_scheduler(folder: Path) -> RecordedScheduler | None:
    """The scheduler in the settings of a folder, None if they name none."""
    settings = _config(folder, SCHEDULER)
    if settings.get("_class_name") is None:
        return None
    name, algorithm = str(settings["_class_name"])[:80], settings.get("algorithm_type", "dpmsolver++")
    sampler = next(
        (
            sampler
            for sampler, entry in SCHEDULERS.items()
            if entry["_class_name"] == name and entry.get("algorithm_type", algorithm) == algorithm
        ),
        None,
    )
    if sampler is None or (sampler == "plms" and settings.get("prediction_type") == "v_prediction"):
        return RecordedScheduler(name)  # PNDMScheduler combines predictions of v before it converts them to noise
    options, expected = f"--sampler {sampler}", {**_STEP_SETTINGS, **SCHEDULERS[sampler]}
    if sampler in ("ddim", "plms"):  # the others end elsewhere, whatever it says
        expected["set_alpha_to_one"] = False
    default = SAMPLERS[sampler].spacing
    spacing = settings.get("timestep_spacing", default)
    if default is not None:
        if spacing in ("leading", "linspace", "trailing"):
            options += f" --timestep-spacing {spacing}" * (spacing != default)
        else:
            expected["timestep_spacing"] = default
        if spacing == "leading":
            expected["steps_offset"] = 1
    if settings.get("use_karras_sigmas"):
        options += " --sigmas karras" * SAMPLERS[sampler].karras
        expected.update({"final_sigmas_type": "zero"} if SAMPLERS[sampler].karras else {"use_karras_sigmas": False})
    values = {**expected, "steps_offset": 0, **_DEFAULTS.get(sampler, {}), **settings}
    differences = [f"{key} {str(values[key])[:40]}" for key in expected if values[key] != expected[key]]
    return RecordedScheduler(name, options, tuple(differences))


def scheduler_note(folder: Path) -> str | None:
    """One line on the scheduler of a folder, which is not selected by loading; None if it is that of a default.

    The defaults are PLMS in txt2img and DDIM in the command lines, both with leading timesteps.
    """
    scheduler = recorded_scheduler(folder)
    if scheduler is None:
        return None
    if scheduler.options is None:
        return f"its scheduler {scheduler.name} is not used, and no sampler here is the same: images differ from diffusers'"
    if scheduler.differences:
        return f"its scheduler is not used; nearest is {scheduler}"
    if scheduler.options in ("--sampler plms", "--sampler ddim"):
        return None
    return f"its scheduler is not selected by loading: for the images of diffusers select {scheduler}"


def require_settings(
    folder: Path, config: ModelConfig, vae: str | Path | None = None, text_encoder: str | Path | None = None
) -> None:
    """Raise CheckpointError if a setting in the folder differs from `config`; absent settings are accepted.

    folder: of a whole model, or the path of a file. vae, text_encoder: files or folders in place of the folder's. The
    weights do not show these settings, and other values would give wrong images without an error.
    """
    schedule, scheduler = config.schedule, SCHEDULER
    expected: dict[tuple[Path, str], Any] = {
        (folder / scheduler, "num_train_timesteps"): schedule.timesteps,
        (folder / scheduler, "beta_start"): schedule.linear_start,
        (folder / scheduler, "beta_end"): schedule.linear_end,
        (folder / scheduler, "beta_schedule"): "scaled_linear",
        (folder / scheduler, "rescale_betas_zero_snr"): False,
        (_settings_of("autoencoder", vae or folder), "scaling_factor"): config.scale_factor,
        # Fewer than the weights have: later layers are skipped in diffusers ("clip skip").
        (_settings_of("text_encoder", text_encoder or folder), "num_hidden_layers"): config.text.layers,
    }
    for (file, key), required in expected.items():
        value: Any = _config(file.parent, file.name).get(key)
        numeric = type(value) in (int, float) and type(required) in (int, float)
        equal = math.isclose(value, required, rel_tol=1e-6) if numeric else value == required
        if value is not None and not equal:
            raise _unsupported(file, key, value, required)


def _settings_of(network: str, path: str | Path) -> Path:
    """File of a network's settings in the folder of a whole model, or in its own folder."""
    path, name = Path(path), WEIGHT_FILES[network][0]
    return path / "config.json" if _weight_files(path, network) else path / name / "config.json"


def _unsupported(file: Path, key: str, value: Any, supported: Any) -> CheckpointError:
    return CheckpointError(f"{file}: {key} {str(value)[:80]!r} is not supported, only {supported}: use other weights")
