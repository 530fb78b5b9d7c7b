"""Detection of the model in a state dict: architecture, prediction type, text encoder, and models of other types."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from sd.checkpoint import layouts
from sd.checkpoint.file_formats import FileIndex
from sd.checkpoint.spellings import V_PREDICTION_MARKERS, original_names, prefixes
from sd.config.presets import (
    DEPTH_CHANNELS,
    INPAINTING_CHANNELS,
    INPUTS,
    OTHER_INPUTS,
    PRESETS,
    ModelConfig,
    Parameterization,
    TextKind,
)
from sd.errors import CheckpointError

_FIRST_CONV = f"{layouts.UNET}input_blocks.0.0.weight"
# The second name is of joined matrices, for a context as wide as the block.
_CROSS_KEYS = [
    re.compile(rf"{re.escape(layouts.UNET)}.*\.attn2\.{name}$")
    for name in (r"(to_k\.weight|mha\.k_proj_weight)", r"mha\.in_proj_weight")
]
_OTHER_UNETS = (  # a name that only this model type has, and its description
    (r"conditioner\.embedders\.1\.", "is a Stable Diffusion XL checkpoint"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "is a Stable Diffusion 3 checkpoint"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "is a Flux checkpoint"),
    (r"(model\.diffusion_model\.)?label_emb\.", "has class embeddings, like unCLIP and Stable Diffusion XL"),
    (r"((model\.diffusion_model|unet)\.)?add_embedding\.", "has the UNet of Stable Diffusion XL"),
    (r"lora_controlnet$|(input_hint_block|zero_convs)\.", "is a ControlNet, which extends a model"),
)
_EMBEDDING = "is a textual inversion embedding, which extends a prompt (--embedding FILE)"
_AVERAGES = (
    r"model_ema\.diffusion_model",
    "has no UNet but the averages of its weights (model_ema), which are not used",
)
_PARTS = (  # of files without a UNet
    (r"conditioner\.embedders\.", "is a Stable Diffusion XL checkpoint"),
    (r".*\.(hada_w|lokr_w|oft_blocks)", "is a LoHa, LoKr or OFT, which modifies a model, and is not supported"),
    (r"(.*\.lora_(up|down|A|B)\.|lora_)", "is a LoRA, which modifies a model (--lora FILE)"),
    (r"(control_model\.|controlnet_cond_embedding\.)", "is a ControlNet, which extends a model"),
    (r"emb_params$", _EMBEDDING),
    (r".*motion_modules\.", "is a motion module of AnimateDiff, which extends a model"),
    (r"(image_proj|ip_adapter)\.", "is an IP-Adapter, which extends a model"),
    (r".*_custom_diffusion\.", "is of Custom Diffusion, which modifies a model"),
    (r"(adapter\.)?body\.\d", "is a T2I-Adapter, which extends a model"),
    (r"(en|de)coder\.(layers\.)?\d+\.", "is a tiny autoencoder (TAESD), which is not supported"),
    (r"(.*\.)?(concept|special_care)_embeds$", "is a safety checker"),
    (r"(down_blocks|time_embedding)\.", "is the UNet of a diffusers folder, and incomplete: give the folder itself"),
    (r"(first_stage_model\.|vae\.)?(encoder|decoder)\.(down|up|mid|conv_in)", "is an autoencoder alone, for --vae"),
    (r"(\w+\.)*(text_model|resblocks|token_embedding)\.", "is a text encoder alone, for --text-encoder"),
)
_FAMILIES = {768: "an SD1", 1024: "an SD2"}  # by the width of the context
_TEXT_KINDS: dict[int, TextKind] = {768: "clip", 1024: "openclip"}
# How to select the other prediction type, by preset and prediction type.
_CONFIGS = {
    ("sd1", "eps"): "sd1",
    ("sd1", "v"): "v1-inference-v.yaml",
    ("sd2", "eps"): "sd2",
    ("sd2", "v"): "sd2-v",
    ("sd2-v", "eps"): "sd2",
    ("sd2-v", "v"): "sd2-v",
    ("sd1-inpaint", "eps"): "sd1-inpaint",
    ("sd2-inpaint", "eps"): "sd2-inpaint",
    ("sd2-depth", "eps"): "sd2-depth",
}
_MISSING = {  # part, option
    "autoencoder": ("autoencoder (first_stage_model.*)", "--vae FILE"),
    "text_encoder": ("text encoder (cond_stage_model.*)", "--text-encoder FILE"),
}
# Metadata of Stability's ModelSpec, of which the second key is ComfyUI's, and their values.
_METADATA = ("modelspec.prediction_type", "modelspec.predict_key", "modelspec.architecture")
_PREDICTIONS: dict[str, Parameterization] = {
    "epsilon": "eps",
    "eps": "eps",
    "v": "v",
    "v_prediction": "v",
    "stable-diffusion-v2-512": "eps",
    "stable-diffusion-v2-768-v": "v",
}


@dataclass(frozen=True)
class Prediction:
    """Prediction type that a checkpoint records, and where."""

    parameterization: Parameterization
    source: str


def recorded_prediction(file_index: FileIndex) -> Prediction | None:
    """Prediction type that a single file records in a marker or its metadata; the weights do not show it."""
    names = {*original_names(file_index.tensors, strict=False).values(), *file_index.others}
    for name in V_PREDICTION_MARKERS:
        if name in names:
            return Prediction("v", f"entry {name}")
    for key in _METADATA:
        predicted = _PREDICTIONS.get(file_index.metadata.get(key, ""))
        if predicted is not None:
            return Prediction(predicted, f"metadata {key}")
    return None


def config_with(config: ModelConfig, parameterization: Parameterization) -> str:
    """Advice for the other prediction type: the value of --config."""
    name = _CONFIGS.get((config.name, parameterization))
    return f"--config {name}" if name else f"a YAML file with parameterization: {parameterization} as --config"


def reject_other_models(path: str | Path, state: Mapping[str, Tensor], names: Collection[str] = ()) -> None:
    """Raise CheckpointError, naming the model type, unless `state` (original names) has the UNet of SD1 or SD2.

    names: those in the file, where they differ.
    """
    names = [*state, *names]
    whole = "only whole Stable Diffusion 1 and 2 models can be loaded"
    patterns: tuple[tuple[str, str], ...] = _OTHER_UNETS
    if _FIRST_CONV not in state:
        alone = len(_missing_parts(state)) > 0
        patterns = (*_OTHER_UNETS, _AVERAGES, *(_PARTS if alone else ()))
    for pattern, description in patterns:
        if any(re.match(pattern, name) for name in names):
            raise CheckpointError(f"{path}: {description}; {whole}")
    if _FIRST_CONV not in state:
        if len(state) <= 2 and all(
            tensor.is_floating_point() and tensor.dim() in (1, 2) and tensor.shape[-1] in (*_FAMILIES, 1280)
            for tensor in state.values()
        ):
            raise CheckpointError(f"{path}: {_EMBEDDING}; {whole}")
        raise CheckpointError(f"{path}: has no Stable Diffusion UNet ({_FIRST_CONV} is missing); give a whole model")
    if state[_FIRST_CONV].dim() != 4:
        raise CheckpointError(f"{path}: {_FIRST_CONV} is not a convolution; download the file again")


def _missing_parts(names: Collection[str]) -> list[str]:
    return [part for part in _MISSING if not any(name.startswith(prefixes(part)) for name in names)]


def require_parts(path: str | Path, names: Collection[str]) -> None:
    """Raise CheckpointError, with the option that adds it, if a checkpoint has no autoencoder or no text encoder."""
    if missing := _missing_parts(names):
        parts, options = (
            " and no ".join(_MISSING[part][0] for part in missing),
            [_MISSING[part][1] for part in missing],
        )
        raise CheckpointError(f"{path}: has no {parts}: pass {' and '.join(options)}, or the file of a whole model")


def context_width(path: str | Path, state: Mapping[str, Tensor]) -> int:
    """Width of the context of the UNet's cross-attention."""
    for pattern in _CROSS_KEYS:
        for name, tensor in state.items():
            if pattern.match(name) and tensor.dim() == 2:
                return int(tensor.shape[1])
    raise CheckpointError(f"{path}: its UNet has no cross-attention to a prompt; give a text-to-image model")


def text_kind(path: str | Path, state: Mapping[str, Tensor]) -> TextKind | None:
    """Type of the text encoder; transformers' names are used for both, which the width or the projections then tell apart."""
    named = layouts.text_kind(state)
    if named != "clip":
        return named
    linear = any(name.endswith(".proj_in.weight") and weight.dim() == 2 for name, weight in state.items())
    return _TEXT_KINDS.get(context_width(path, state), "openclip" if linear else "clip")


def detect(path: str | Path, state: Mapping[str, Tensor], predicted: Prediction | None) -> ModelConfig:
    """The preset whose sizes the file has, with the prediction type that the checkpoint records, if any."""
    width, (channels, inputs) = context_width(path, state), state[_FIRST_CONV].shape[:2]
    for name in ("sd1", "sd2", "tiny"):
        config = PRESETS[name]
        if (config.unet.context_dim, config.unet.model_channels) == (width, channels):
            if inputs == INPAINTING_CHANNELS:
                config = config.as_inpainting()
            elif inputs == DEPTH_CHANNELS:
                config = config.as_depth_to_image()
            if predicted is None or predicted.parameterization == config.parameterization:
                return config
            return (
                PRESETS["sd2-v"]
                if config.name == "sd2"
                else replace(config, parameterization=predicted.parameterization)
            )
    raise CheckpointError(
        f"{path}: no preset has a context of {width} and {channels} channels; give the config as a YAML file"
    )


def reject_contradiction(
    path: str | Path, state: Mapping[str, Tensor], config: ModelConfig, predicted: Prediction | None
) -> None:
    """Raise CheckpointError if the checkpoint shows that `config` describes another model."""
    channels, inputs = state[_FIRST_CONV].shape[1], config.unet.in_channels
    if channels != inputs:
        supported = {config.unet.out_channels: "a text-to-image", **INPUTS}
        remedy = "only text-to-image, inpainting and depth-to-image models can be loaded"
        if channels in supported:
            remedy = "pass the config of this model, or none"
        raise CheckpointError(
            f"{path}: is of {({**OTHER_INPUTS, **supported}).get(channels, 'another')} model, whose UNet takes {channels} "
            f"channels, not {inputs} as in the config {config.name}: {remedy}"
        )
    width, expected = context_width(path, state), config.unet.context_dim
    text = text_kind(path, state)
    if width != expected or text not in (None, config.text.kind):
        remedies = {768: "pass config='sd1'", 1024: "pass config='sd2' or 'sd2-v'"}
        raise CheckpointError(
            f"{path}: is {_FAMILIES.get(width, 'a custom')} checkpoint (context of {width}, {text or 'no'} text encoder), "
            f"but the config {config.name} describes {_FAMILIES.get(expected, 'a custom')} model (context of {expected}, "
            f"{config.text.kind} text encoder): "
            f"{remedies.get(width, 'pass the YAML file of the model')}, or no config"
        )
    if predicted is not None and predicted.parameterization != config.parameterization:
        raise CheckpointError(
            f"{path}: its {predicted.source} is for a UNet that predicts {predicted.parameterization}, but the config "
            f"{config.name} is for {config.parameterization}: pass {config_with(config, predicted.parameterization)}"
        )
