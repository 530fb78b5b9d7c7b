"""Checkpoints in the folder layout of diffusers: one subfolder for each network, with its config.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sd.checkpoint import layouts
from sd.checkpoint.file_formats import FileIndex, index, read_tensors, write_safetensors
from sd.config.presets import ModelConfig, Parameterization, TextKind
from sd.errors import CheckpointError

# Subfolder and file name stem of each network's weights.
WEIGHT_FILES = {
    "unet": ("unet", "diffusion_pytorch_model"),
    "autoencoder": ("vae", "diffusion_pytorch_model"),
    "text_encoder": ("text_encoder", "model"),
}
PREDICTION_TYPES: dict[str, Parameterization] = {"epsilon": "eps", "v_prediction": "v"}


def _index_network(folder: Path, network: str) -> FileIndex:
    name, stem = WEIGHT_FILES[network]
    old = "pytorch_model" if stem == "model" else stem  # transformers names its .bin files differently
    candidates = [f"{stem}.safetensors", f"{old}.bin", f"{stem}.fp16.safetensors", f"{old}.fp16.bin"]
    for candidate in candidates:
        if (folder / name / candidate).is_file():
            return index(folder / name / candidate)
    if any((folder / name).glob("*.index*.json")):
        raise CheckpointError(f"{folder / name}: the weights are split into shards; save the model unsharded")
    raise CheckpointError(
        f"{folder}: is no diffusers folder of a whole model, {name}/{candidates[0]} is missing; "
        f"give a folder with unet, vae and text_encoder in it, or a single file"
    )


def read_folder(folder: Path, progress: bool | None = None) -> layouts.State:
    """Read the weights of a diffusers folder in the original layout. Raises CheckpointError naming a missing file."""
    if (folder / "text_encoder_2").is_dir():
        raise CheckpointError(f"{folder}: is a Stable Diffusion XL model; only Stable Diffusion 1 and 2 can be loaded")
    indices = {network: _index_network(folder, network) for network in WEIGHT_FILES}  # all, before tensors are read
    states = {network: read_tensors(file_index, None, progress) for network, file_index in indices.items()}
    states["text_encoder"].pop("text_model.embeddings.position_ids", None)
    states["text_encoder"].pop("embeddings.position_ids", None)
    try:
        unet = layouts.unet_from_diffusers(states.pop("unet"))
        networks = {
            "unet": unet,
            "autoencoder": layouts.autoencoder_from_diffusers(states.pop("autoencoder")),
            "text_encoder": layouts.hf_text_to_openclip(states.pop("text_encoder")),
        }
        # SD1 projects with 1x1 convolutions, SD2 with matrices.
        linear = any(name.endswith(".proj_in.weight") and weight.dim() == 2 for name, weight in unet.items())
        return layouts.join_networks(networks, _text_kind(folder) or ("openclip" if linear else "clip"))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


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
    return activations.get(str(_config(folder, "text_encoder/config.json").get("hidden_act")))


def parameterization(folder: Path) -> Parameterization | None:
    """Prediction type in the folder's scheduler settings: eps, v, or None if absent."""
    file = "scheduler/scheduler_config.json"
    value = _config(folder, file).get("prediction_type")
    if value is not None and str(value) not in PREDICTION_TYPES:
        raise _unsupported(folder, file, "prediction_type", value, " and ".join(PREDICTION_TYPES))
    return PREDICTION_TYPES.get(str(value))


def require_settings(folder: Path, config: ModelConfig) -> None:
    """Raise CheckpointError if a setting in the folder differs from `config`; absent settings are accepted.

    The weights do not show these settings, and other values would give wrong images without an error.
    """
    schedule, scheduler = config.schedule, "scheduler/scheduler_config.json"
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


# --- writing


def unet_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of UNet2DConditionModel."""
    unet = config.unet
    channels = [unet.model_channels * multiplier for multiplier in unet.channel_mult]
    attended = [2**level in unet.attention_resolutions for level in range(len(channels))]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": config.image_size // config.autoencoder.downsampling,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(attended)],
        "layers_per_block": unet.num_res_blocks,
        "cross_attention_dim": unet.context_dim,
        # diffusers' misnomer, kept for old files: the number of heads at each level.
        "attention_head_dim": [unet.heads(width) for width in channels],
        "transformer_layers_per_block": unet.transformer_depth,
        "use_linear_projection": unet.use_linear_in_transformer,
        "norm_num_groups": unet.norm_groups,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
    }


def autoencoder_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of AutoencoderKL. Raises CheckpointError for a shape that diffusers does not have."""
    autoencoder = config.autoencoder
    levels = len(autoencoder.channel_mult)
    if autoencoder.latent_channels != autoencoder.embed_dim:
        raise CheckpointError("diffusers requires an autoencoder with embed_dim = z_channels; choose another layout")
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": config.image_size,
        "in_channels": autoencoder.image_channels,
        "out_channels": autoencoder.image_channels,
        "latent_channels": autoencoder.latent_channels,
        "block_out_channels": [autoencoder.channels * multiplier for multiplier in autoencoder.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": autoencoder.num_res_blocks,
        "norm_num_groups": autoencoder.norm_groups,
        "act_fn": "silu",
        "scaling_factor": config.scale_factor,
    }


def text_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of CLIPTextModel."""
    text = config.text
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": text.width,
        "intermediate_size": 4 * text.width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "hidden_act": "gelu" if text.kind == "openclip" else "quick_gelu",
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,  # legacy value: transformers then uses the highest token, which is CLIP's end token
        "pad_token_id": 1,
        "projection_dim": text.width,
    }


def scheduler_config(config: ModelConfig) -> dict[str, Any]:
    """scheduler_config.json of PNDMScheduler."""
    return {
        "_class_name": "PNDMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": config.schedule.linear_start,
        "beta_end": config.schedule.linear_end,
        "num_train_timesteps": config.schedule.timesteps,
        "prediction_type": "v_prediction" if config.parameterization == "v" else "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }


MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_folder(folder: Path, networks: dict[str, layouts.State], config: ModelConfig) -> None:
    """Write a diffusers folder that StableDiffusionPipeline.from_pretrained can load.

    folder: new or empty. networks: {unet, autoencoder, text_encoder} from sd.checkpoint.load.load.
    """
    converted = {
        "unet": layouts.unet_to_diffusers(networks["unet"]),
        "autoencoder": layouts.autoencoder_to_diffusers(networks["autoencoder"]),
        "text_encoder": layouts.openclip_text_to_hf(networks["text_encoder"]),
    }
    configs = {"unet": unet_config, "autoencoder": autoencoder_config, "text_encoder": text_config}
    for network, (name, stem) in WEIGHT_FILES.items():
        _write_json(folder / name / "config.json", configs[network](config))
        write_safetensors(folder / name / f"{stem}.safetensors", converted[network], {"format": "pt"})
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(config))
    write_tokenizer(folder / "tokenizer", config)
    pipeline = "StableDiffusionInpaintPipeline" if config.inpainting else MODEL_INDEX["_class_name"]
    _write_json(folder / "model_index.json", {**MODEL_INDEX, "_class_name": pipeline})


def write_tokenizer(folder: Path, config: ModelConfig) -> None:
    """Write CLIP's vocabulary, from the copy in open_clip_torch, as the files of transformers' CLIPTokenizer."""
    from open_clip.tokenizer import SimpleTokenizer  # slow to import

    tokenizer = SimpleTokenizer()
    merges = [" ".join(pair) for pair, _ in sorted(tokenizer.bpe_ranks.items(), key=lambda item: item[1])]
    start, end = "<|startoftext|>", "<|endoftext|>"
    # SD1 pads with the end token; SD2 with token 0, which is the exclamation mark.
    pad = end if config.text.kind == "clip" else "!"
    rename = {"<start_of_text>": start, "<end_of_text>": end}
    _write_json(folder / "vocab.json", {rename.get(token, token): i for token, i in tokenizer.encoder.items()})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    _write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": config.text.context_length}
    _write_json(folder / "tokenizer_config.json", {**special, **settings, "do_lower_case": True})
