"""The folder layout of diffusers, in which most weights are shared: one folder for each part, with its config.json."""

from __future__ import annotations

import json
import math
from pathlib import Path

from sd.checkpoint import layouts
from sd.checkpoint.file_formats import Contents, index, read_tensors, write_safetensors
from sd.config.presets import ModelConfig
from sd.errors import CheckpointError

# Part of the model, its folder, and the names its weights go by, the best first.
WEIGHT_FILES = {
    "unet": ("unet", "diffusion_pytorch_model"),
    "autoencoder": ("vae", "diffusion_pytorch_model"),
    "text_encoder": ("text_encoder", "model"),
}


def _weights(folder: Path, part: str) -> Contents:
    name, stem = WEIGHT_FILES[part]
    old = "pytorch_model" if stem == "model" else stem  # transformers' own name for a .bin
    candidates = [f"{stem}.safetensors", f"{old}.bin", f"{stem}.fp16.safetensors", f"{old}.fp16.bin"]
    for candidate in candidates:
        if (folder / name / candidate).is_file():
            return index(folder / name / candidate)
    if any((folder / name).glob("*.index*.json")):
        raise CheckpointError(
            f"{folder / name}: its weights are split into shards; save the model unsharded and give that"
        )
    raise CheckpointError(
        f"{folder}: is no diffusers folder of a whole model, {name}/{candidates[0]} is missing; "
        f"give a folder with unet, vae and text_encoder in it, or a single file"
    )


def read_folder(folder: Path, progress: bool | None = None) -> layouts.State:
    """The weights of a diffusers folder in the original layout. Raises CheckpointError naming what is missing."""
    if (folder / "text_encoder_2").is_dir():
        raise CheckpointError(f"{folder}: is a Stable Diffusion XL model; only Stable Diffusion 1 and 2 can be loaded")
    found = {part: _weights(folder, part) for part in WEIGHT_FILES}  # refuse before anything is read
    states = {part: read_tensors(contents, None, progress) for part, contents in found.items()}
    states["text_encoder"].pop("text_model.embeddings.position_ids", None)
    states["text_encoder"].pop("embeddings.position_ids", None)
    try:
        networks = {
            "unet": layouts.unet_from_diffusers(states.pop("unet")),
            "autoencoder": layouts.autoencoder_from_diffusers(states.pop("autoencoder")),
            "text_encoder": layouts.hf_text_to_openclip(states.pop("text_encoder")),
        }
        # The projection of SD1's 1x1 convolutions and SD2's matrices tells the two apart, as in the original layout.
        linear = any(
            name.endswith(".proj_in.weight") and weight.dim() == 2 for name, weight in networks["unet"].items()
        )
        return layouts.join_networks(networks, _text_kind(folder) or ("openclip" if linear else "clip"))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def _config(folder: Path, name: str) -> dict:
    path = folder / name
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{path}: is no readable JSON; take the folder again from its source") from None
    if type(config) is not dict:
        raise CheckpointError(f"{path}: holds no settings; take the folder again from its source")
    return config


def _text_kind(folder: Path) -> str | None:
    return {"quick_gelu": "clip", "gelu": "openclip"}.get(
        str(_config(folder, "text_encoder/config.json").get("hidden_act"))
    )


def parameterization(folder: Path) -> str | None:
    """What the UNet predicts by the folder's scheduler: eps, v, or None where it does not say."""
    file, known = "scheduler/scheduler_config.json", {"epsilon": "eps", "v_prediction": "v"}
    given = _config(folder, file).get("prediction_type")
    if given is not None and str(given) not in known:
        raise _cannot(folder, file, "prediction_type", given, " and ".join(known))
    return known.get(str(given))


def require_settings(folder: Path, config: ModelConfig) -> None:
    """Raise CheckpointError where the folder's own settings, as far as it gives them, are not those of `config`.

    Weights do not show these, and with others the pictures are wrong without a word.
    """
    schedule, scheduler = config.schedule, "scheduler/scheduler_config.json"
    expected = {
        (scheduler, "num_train_timesteps"): schedule.timesteps,
        (scheduler, "beta_start"): schedule.linear_start,
        (scheduler, "beta_end"): schedule.linear_end,
        (scheduler, "beta_schedule"): "scaled_linear",
        (scheduler, "rescale_betas_zero_snr"): False,
        ("vae/config.json", "scaling_factor"): config.scale_factor,
    }
    for (file, key), value in expected.items():
        given = _config(folder, file).get(key)
        alike = math.isclose(given, value, rel_tol=1e-6) if _is_number(given) and _is_number(value) else given == value
        if given is not None and not alike:
            raise _cannot(folder, file, key, given, value)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cannot(folder: Path, file: str, key: str, given, expected) -> CheckpointError:
    return CheckpointError(
        f"{folder / file}: {key} {str(given)[:80]!r} is not offered, only {expected}: take other weights"
    )


# --- writing


def unet_config(config: ModelConfig) -> dict:
    unet = config.unet
    levels = range(len(unet.channel_mult))
    channels = [unet.model_channels * multiplier for multiplier in unet.channel_mult]
    attended = [2**level in unet.attention_resolutions for level in levels]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": config.image_size // config.autoencoder.downsampling,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attended)],
        "layers_per_block": unet.num_res_blocks,
        "cross_attention_dim": unet.context_dim,
        # A misnomer that diffusers keeps for the sake of old files: it is the number of heads, level by level.
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


def autoencoder_config(config: ModelConfig) -> dict:
    autoencoder = config.autoencoder
    levels = len(autoencoder.channel_mult)
    if autoencoder.latent_channels != autoencoder.embed_dim:
        raise CheckpointError(
            "diffusers has no autoencoder whose embed_dim is not its z_channels; choose another layout"
        )
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


def text_config(config: ModelConfig) -> dict:
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
        "eos_token_id": 2,  # of old: transformers then takes the highest token, which is CLIP's end token
        "pad_token_id": 1,
        "projection_dim": text.width,
    }


def scheduler_config(config: ModelConfig) -> dict:
    return {
        "_class_name": "PNDMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": config.schedule.linear_start,
        "beta_end": config.schedule.linear_end,
        "num_train_timesteps": config.schedule.timesteps,
        "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[config.parameterization],
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


def _write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_folder(folder: Path, networks: dict[str, layouts.State], config: ModelConfig) -> None:
    """Write a diffusers folder that StableDiffusionPipeline.from_pretrained takes.

    folder: new or empty. networks: {unet, autoencoder, text_encoder} as sd.checkpoint.load.load returns them.
    """
    converted = {
        "unet": layouts.unet_to_diffusers(networks["unet"]),
        "autoencoder": layouts.autoencoder_to_diffusers(networks["autoencoder"]),
        "text_encoder": layouts.openclip_text_to_hf(networks["text_encoder"]),
    }
    configs = {"unet": unet_config, "autoencoder": autoencoder_config, "text_encoder": text_config}
    for part, (name, stem) in WEIGHT_FILES.items():
        _write_json(folder / name / "config.json", configs[part](config))
        write_safetensors(folder / name / f"{stem}.safetensors", converted[part], {"format": "pt"})
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(config))
    write_tokenizer(folder / "tokenizer", config)
    _write_json(folder / "model_index.json", MODEL_INDEX)


def write_tokenizer(folder: Path, config: ModelConfig) -> None:
    """CLIP's vocabulary, from the copy inside open_clip_torch, in the two files of transformers' CLIPTokenizer."""
    from open_clip.tokenizer import SimpleTokenizer  # slow to import, and only needed here

    tokenizer = SimpleTokenizer()
    merges = [" ".join(pair) for pair, _ in sorted(tokenizer.bpe_ranks.items(), key=lambda item: item[1])]
    # SD1 pads with the end token; SD2 with token 0, which is the exclamation mark.
    pad = "<|endoftext|>" if config.text.kind == "clip" else "!"
    rename = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    _write_json(folder / "vocab.json", {rename.get(token, token): i for token, i in tokenizer.encoder.items()})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": config.text.context_length,
            "do_lower_case": True,
        },
    )
