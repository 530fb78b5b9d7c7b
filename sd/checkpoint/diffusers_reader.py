"""Checkpoints in the folder layout of diffusers: one subfolder for each network, with its config.json.

Weights are .safetensors or .bin files, whole or in shards that an index lists, with or without a variant such as fp16 in
their names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sd.checkpoint import layouts
from sd.checkpoint.diffusers_folder import IGNORED_SETTINGS, SCHEDULERS, TIMESTEP_SPACING, WEIGHT_FILES
from sd.checkpoint.file_formats import FileIndex, index, read_tensors
from sd.config.presets import ModelConfig, Parameterization, TextKind
from sd.errors import CheckpointError

Reader = Callable[[FileIndex, Iterable[str], "bool | None"], layouts.State]
PREDICTION_TYPES: dict[str, Parameterization] = {"epsilon": "eps", "v_prediction": "v"}
SCHEDULER = "scheduler/scheduler_config.json"
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
            f"give a folder with unet, vae and text_encoder in it, or a single file{option}"
        )
    return [index(file) for file in files]


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
    if not _weight_files(folder, network):
        return read_folder(folder, progress, [network], strict, read)
    state = _read_shards([index(file) for file in _weight_files(folder, network)], progress, read)
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
        raise _unsupported(folder, SCHEDULER, "prediction_type", value, " and ".join(PREDICTION_TYPES))
    return PREDICTION_TYPES.get(str(value))


def scheduler_difference(folder: Path) -> str | None:
    """Description of how the folder's own sampling differs from every sampler of `sd`; None if it does not."""
    settings = _config(folder, SCHEDULER)
    name = settings.get("_class_name")
    if name is None:
        return None
    sampler = next((sampler for sampler, entry in SCHEDULERS.items() if entry["_class_name"] == name), None)
    if sampler is None:
        return f"its scheduler {str(name)[:80]} is not used, and no sampler here is the same"
    if sampler == "plms" and settings.get("prediction_type") == "v_prediction":
        return f"its scheduler {name} is not used: it combines predictions of v unlike --sampler plms"
    required = {"timestep_spacing": TIMESTEP_SPACING[sampler], **IGNORED_SETTINGS}
    for key, value in required.items():
        if settings.get(key, value) != value:
            setting = f"its setting {key} {str(settings[key])[:40]}"
            return f"{setting} of {name} is not used: --sampler {sampler} has {value}"
    return None


def require_settings(folder: Path, config: ModelConfig) -> None:
    """Raise CheckpointError if a setting in the folder differs from `config`; absent settings are accepted.

    The weights do not show these settings, and other values would give wrong images without an error.
    """
    schedule, scheduler = config.schedule, SCHEDULER
    expected: dict[tuple[str, str], Any] = {
        (scheduler, "num_train_timesteps"): schedule.timesteps,
        (scheduler, "beta_start"): schedule.linear_start,
        (scheduler, "beta_end"): schedule.linear_end,
        (scheduler, "beta_schedule"): "scaled_linear",
        (scheduler, "rescale_betas_zero_snr"): False,
        ("vae/config.json", "scaling_factor"): config.scale_factor,
    }
    for (file, key), required in expected.items():
        value: Any = _config(folder, file).get(key)
        numeric = type(value) in (int, float) and type(required) in (int, float)
        equal = math.isclose(value, required, rel_tol=1e-6) if numeric else value == required
        if value is not None and not equal:
            raise _unsupported(folder, file, key, value, required)


def _unsupported(folder: Path, file: str, key: str, value: Any, supported: Any) -> CheckpointError:
    return CheckpointError(
        f"{folder / file}: {key} {str(value)[:80]!r} is not supported, only {supported}: use other weights"
    )
