"""LoRA files and their exact, reversible merge into the weights (LoRA: arXiv 2106.09685).

A file holds factors `down` [r, in, ...] and `up` [out, r, ...] for some weights, and merging at scale s adds
s * alpha / r * up @ down to each; without alpha it is r. Layouts that are read:
- kohya: lora_unet_<name>.lora_down.weight, .lora_up.weight, .alpha; lora_te_<name> for the text encoder, `.` as `_`.
- PEFT as diffusers saves it: unet.<name>.lora_A.weight, .lora_B.weight; r and alpha also in the file's metadata.
- diffusers before PEFT: unet.<name>.processor.to_q_lora.down.weight, with or without `unet.`.
<name> is diffusers' name of the module, or the original's. `_` is ambiguous, so names are compared with the flattened
names of the model instead of being parsed. Sources: kohya-ss/sd-scripts, huggingface/diffusers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd.checkpoint import layouts
from sd.checkpoint.file_formats import FileIndex, index, read_tensors
from sd.errors import CheckpointError, listed

_PARTS = {  # end of the key: part of the update
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
_OTHER_KINDS = {  # part of a key: the method that it belongs to
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon with a Tucker core (lora_mid)",
    "oft_": "OFT",
    "boft_": "BOFT",
    "ia3_": "IA3",
    ".on_input": "IA3",
    "lora_te1_": "LoRA for Stable Diffusion XL",
    "lora_te2_": "LoRA for Stable Diffusion XL",
    "text_encoder_2.": "LoRA for Stable Diffusion XL",
    "base_model.model.": "LoRA with alpha in another file, adapter_config.json,",
    "lora_B.bias": "LoRA with biases",
    ".diff_b": "full difference of weights",
    ".diff": "full difference of weights",
}
_NETWORKS = {"lora_unet_": "unet_", "unet_": "unet_", "lora_te_": "text_encoder_", "text_encoder_": "text_encoder_"}


@dataclass(frozen=True)
class Update:
    """Low-rank update of one weight: down [r, in, ...] and up [out, r, ...] in the file's dtype, scale alpha / r."""

    down: Tensor
    up: Tensor
    scale: float

    def dense(self, weight: Tensor) -> Tensor:
        """scale * up @ down in fp32, with the shape and device of `weight`."""
        down, up = (factor.to(weight.device, torch.float32).flatten(1) for factor in (self.down, self.up))
        return self.scale * (up @ down).reshape(weight.shape)


Updates = dict[str, Update]


def targets(state: layouts.State) -> layouts.State:
    """Matrices and convolutions that a LoRA can change, by diffusers' names of their modules.

    state: of StableDiffusion.state_dict. The tensors share its memory; those of the text encoder's q, k and v are rows of
    one matrix.
    """
    networks = {
        "unet": layouts.unet_to_diffusers(layouts.with_prefix(state, "unet.")),
        "text_encoder": layouts.openclip_text_to_hf(layouts.with_prefix(state, "text_encoder.")),
    }
    return {
        f"{network}.{name[: -len('.weight')]}": weight
        for network, weights in networks.items()
        for name, weight in weights.items()
        if name.endswith(".weight") and weight.dim() in (2, 4) and not name.endswith("_embedding.weight")
    }


def read_lora(path: str | Path, state: layouts.State) -> Updates:
    """Read a LoRA file, .safetensors or torch, for the model with the state dict `state`; updates by names of `targets`.

    Raises CheckpointError, naming the file, if it is damaged, of another method, incomplete, or if one of its keys matches
    no weight of the model.
    """
    file_index = index(path)
    for name in (*file_index.tensors, *(other for other in file_index.others if not other.startswith("__metadata__"))):
        kind = next((kind for part, kind in _OTHER_KINDS.items() if part in name), None)
        if kind is not None:
            raise CheckpointError(f"{path}: is a {kind} file ({name}); only plain LoRA is supported: use one of those")
    lacking_tensor = [name for name in file_index.others if name.endswith(".alpha")]
    if lacking_tensor:
        raise CheckpointError(f"{path}: {listed(lacking_tensor)} is no tensor; save it again as .safetensors")
    weights, names = targets(state), _flat_names(state)
    parts: dict[str, dict[str, Tensor]] = {}
    unmatched = []
    for key, tensor in read_tensors(file_index, progress=False).items():
        end = next((end for end in _PARTS if key.endswith(end)), None)
        target = names.get(_flatten(key[: -len(end)])) if end else None
        if end is None or target is None:
            unmatched.append(key)
        elif _PARTS[end] in parts.setdefault(target, {}):
            raise CheckpointError(f"{path}: {key} is a second {_PARTS[end]} of {target}; use another file")
        else:
            parts[target][_PARTS[end]] = tensor
    if unmatched:
        raise CheckpointError(
            f"{path}: {len(unmatched)} of {len(file_index.tensors)} keys match no weight of this model: "
            f"{listed(unmatched)}; use a LoRA of Stable Diffusion 1 or 2"
        )
    alphas = _metadata_alphas(path, file_index)
    return {name: _update(path, name, found, weights[name], alphas) for name, found in parts.items()}


def _flatten(module: str) -> str:
    """Flattened name of a module in a file, without the differences between layouts."""
    name = module.replace(".", "_")
    prefix = next((prefix for prefix in _NETWORKS if name.startswith(prefix)), "")
    name = _NETWORKS.get(prefix, "unet_") + name[len(prefix) :]  # UNet2DConditionModel alone saves without a prefix
    return name.replace("_processor_to_", "_to_").replace("text_encoder_text_model_", "text_encoder_")


def _flat_names(state: layouts.State) -> dict[str, str]:
    """Name in `targets` by flattened name, with the names of older files and of the original layout."""
    names = {}
    for name in targets(state):
        flat = _flatten(name)
        names[flat] = name
        names[re.sub(r"_to_out_0$", "_to_out", flat)] = name
        names[re.sub(r"_self_attn_(q|k|v|out)_proj$", r"_self_attn_to_\1", flat)] = name
    unet = layouts.with_prefix(state, "unet.")
    for original, renamed in zip(unet, layouts.unet_to_diffusers(unet)):
        module = f"unet.{renamed[: -len('.weight')]}"
        if renamed.endswith(".weight") and module in names.values():
            names[_flatten("unet." + original[: -len(".weight")])] = module
    return names


def _metadata_alphas(path: str | Path, file_index: FileIndex) -> dict[str, Any]:
    """The settings of PEFT that diffusers writes into the metadata, `unet.lora_alpha` and the like; empty without."""
    text = file_index.metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: lora_adapter_metadata is no readable JSON; download the file again")
    for name, value in settings.items():
        kind = {"use_dora": "DoRA", "lora_bias": "LoRA with biases"}.get(name.partition(".")[2])
        if kind is not None and value:
            raise CheckpointError(f"{path}: is a {kind} file ({name}); only plain LoRA is supported: use one of those")
        patterns = value or {} if name.endswith(".alpha_pattern") else {}
        alphas = [value] if name.endswith(".lora_alpha") else []
        valid = isinstance(patterns, dict) and all(map(_is_pattern, patterns))
        if not valid or not all(map(_is_finite, [*alphas, *patterns.values()])):
            raise CheckpointError(
                f"{path}: {name} in lora_adapter_metadata is invalid or too complex; use another file"
            )
    return settings


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < math.inf


def _is_pattern(text: str) -> bool:
    """Whether this is a regular expression that takes no exponential time: repetitions are few, and none is of a group."""
    try:
        re.compile(text)
    except (re.error, RecursionError):
        return False
    return len(text) <= 1000 and not re.search(r"\)[*+?{]", text) and len(re.findall(r"[*+{]", text)) <= 3


def _scale(name: str, rank: int, alpha: float | None, settings: Mapping[str, Any]) -> float:
    """alpha / r of a module: from its own key, else from the settings of PEFT, else 1."""
    network, _, module = name.partition(".")
    if alpha is None and f"{network}.lora_alpha" in settings:
        patterns = settings.get(f"{network}.alpha_pattern") or {}
        matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
        alpha = float(next(matching, settings[f"{network}.lora_alpha"]))
        if settings.get(f"{network}.use_rslora"):  # rank-stabilised, arXiv 2312.03732
            return alpha / math.sqrt(rank)
    return 1.0 if alpha is None else alpha / rank


def _update(
    path: str | Path, name: str, parts: Mapping[str, Tensor], weight: Tensor, settings: Mapping[str, Any]
) -> Update:
    missing = [part for part in ("down", "up") if part not in parts]
    if missing:
        raise CheckpointError(f"{path}: {name} has no {' and no '.join(missing)}: the file is incomplete")
    down, up = parts["down"], parts["up"]
    shapes = f"down {tuple(down.shape)}, up {tuple(up.shape)}, weight {tuple(weight.shape)}"
    fits = (
        down.dim() in (2, 4)
        and up.dim() in (2, 4)
        and len(down) > 0
        and _without_ones(down.shape[1:]) == _without_ones(weight.shape[1:])
        and (len(up), up[0].numel()) == (len(weight), len(down))
    )
    if not fits:
        raise CheckpointError(f"{path}: {name} does not fit this model ({shapes}); SD1 and SD2 need LoRA of their own")
    alpha = parts.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise CheckpointError(f"{path}: alpha of {name} is no number; use another file")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in parts.values()):
        raise CheckpointError(f"{path}: {name} is not finite; download the file again")
    return Update(down, up, _scale(name, len(down), None if alpha is None else float(alpha), settings))


def _without_ones(shape: torch.Size) -> list[int]:
    """Shape without the axes of a 1x1 kernel, which a matrix lacks."""
    lengths = list(shape)
    while len(lengths) > 1 and lengths[-1] == 1:
        lengths.pop()
    return lengths


class Merged:
    """The LoRA files that are merged into a model, and copies in host memory of the weights that they changed."""

    def __init__(self) -> None:
        self.loras: list[tuple[Updates, float]] = []
        self.originals: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, updates: Updates, scale: float, weights: layouts.State) -> None:
        """Merge `updates`; weights: of `targets`, written in place, so that compiled code and fused matrices stay valid.

        Sums are fp32 and start from the original weights: each weight is rounded once, whatever the number of files.
        """
        before = self.loras
        try:
            self._merge([*before, (updates, scale)], updates, weights)
        except BaseException:  # such as Ctrl-C: called again, it must not merge twice
            self._merge(before, self.originals.keys() & updates.keys(), weights)
            if not before:
                self.originals.clear()
            raise
        self.loras = [*before, (updates, scale)]

    def _merge(self, loras: list[tuple[Updates, float]], names: Iterable[str], weights: layouts.State) -> None:
        for name in names:
            weight = weights[name]
            if name not in self.originals:
                self.originals[name] = weight.detach().to("cpu", copy=True)
            total = self.originals[name].to(weight.device, torch.float32)
            for merged, factor in loras:
                if name in merged:
                    total = total + factor * merged[name].dense(weight)
            weight.copy_(total)

    @torch.no_grad()
    def remove(self, weights: layouts.State) -> None:
        """Copy the original weights back."""
        for name, original in self.originals.items():
            weights[name].copy_(original)
        self.loras = []
        self.originals.clear()
