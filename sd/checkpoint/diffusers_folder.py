"""Folders in the layout of diffusers, written for StableDiffusionPipeline.from_pretrained: weights and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sd.checkpoint import layouts
from sd.checkpoint.file_formats import write_safetensors
from sd.config.presets import ModelConfig
from sd.errors import CheckpointError, ConfigError

# Subfolder and file name stem of each network's weights.
WEIGHT_FILES = {
    "unet": ("unet", "diffusion_pytorch_model"),
    "autoencoder": ("vae", "diffusion_pytorch_model"),
    "text_encoder": ("text_encoder", "model"),
}
# By sampler of `sd`: the scheduler of diffusers that takes the same steps, and its settings.
SCHEDULERS: dict[str, dict[str, Any]] = {
    "ddim": {"_class_name": "DDIMScheduler"},
    "plms": {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    "dpm_solver": {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "sigma_min",
        "lower_order_final": True,
        "solver_order": 2,
        "solver_type": "midpoint",
    },
    "euler": {"_class_name": "EulerDiscreteScheduler"},
    "euler_ancestral": {"_class_name": "EulerAncestralDiscreteScheduler"},
    "heun": {"_class_name": "HeunDiscreteScheduler"},
    "dpm_solver_sde": {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "sde-dpmsolver++",
        "final_sigmas_type": "zero",
        "solver_order": 2,
        "solver_type": "midpoint",
    },
    "unipc": {
        "_class_name": "UniPCMultistepScheduler",
        "final_sigmas_type": "zero",
        "solver_order": 2,
        "solver_type": "bh2",
    },
    "lcm": {"_class_name": "LCMScheduler"},
}


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
        "time_cond_proj_dim": unet.guidance_embedding,
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
        "torch_dtype": "float32",  # as diffusers loads the others; transformers 5 would keep that of the weights
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


def scheduler_config(config: ModelConfig, sampler: str = "plms") -> dict[str, Any]:
    """scheduler_config.json of the scheduler that takes the steps of `sampler`.

    The settings of DDIMScheduler are always written: a scheduler that is made from this one would otherwise clip x_0.
    """
    return {
        **SCHEDULERS[sampler],
        "beta_schedule": "scaled_linear",
        "beta_start": config.schedule.linear_start,
        "beta_end": config.schedule.linear_end,
        "clip_sample": False,
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
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def model_index(config: ModelConfig, sampler: str) -> dict[str, Any]:
    """model_index.json of the pipeline of the model. StableDiffusionDepth2ImgPipeline gets no depth estimator."""
    index = {**MODEL_INDEX, "scheduler": ["diffusers", SCHEDULERS[sampler]["_class_name"]]}
    if config.inpainting:
        index["_class_name"] = "StableDiffusionInpaintPipeline"
    if config.depth_to_image:
        others = ("image_encoder", "requires_safety_checker", "safety_checker")
        index = {key: value for key, value in index.items() if key not in others}
        index.update({"_class_name": "StableDiffusionDepth2ImgPipeline", "depth_estimator": [None, None]})
    return index


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_folder(
    folder: Path, networks: dict[str, layouts.State], config: ModelConfig, sampler: str | None = None
) -> None:
    """Write a diffusers folder that from_pretrained of the model's pipeline can load.

    Of a depth-to-image model only with depth_estimator=None and feature_extractor=None, since the folder has neither.

    folder: new or empty. networks: {unet, autoencoder, text_encoder} from sd.checkpoint.load.load. sampler: a key of
    SCHEDULERS, whose scheduler the folder gets; None for plms, and for ddim if the UNet predicts v. Raises ConfigError for
    plms with v: PNDMScheduler combines the predictions of v before it converts them to noise, and gives other images.
    """
    predicts_v = config.parameterization == "v"
    if sampler == "plms" and predicts_v:
        raise ConfigError("--sampler plms: PNDMScheduler of diffusers samples models of v differently; choose another")
    sampler = sampler or ("ddim" if predicts_v else "plms")
    converted = {
        "unet": layouts.unet_to_diffusers(networks["unet"]),
        "autoencoder": layouts.autoencoder_to_diffusers(networks["autoencoder"]),
        "text_encoder": layouts.openclip_text_to_hf(networks["text_encoder"]),
    }
    configs = {"unet": unet_config, "autoencoder": autoencoder_config, "text_encoder": text_config}
    for network, (name, stem) in WEIGHT_FILES.items():
        _write_json(folder / name / "config.json", configs[network](config))
        write_safetensors(folder / name / f"{stem}.safetensors", converted[network], {"format": "pt"})
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(config, sampler))
    write_tokenizer(folder / "tokenizer", config)
    _write_json(folder / "model_index.json", model_index(config, sampler))


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
