"""Checkpoint layouts of one model, and exact, reversible conversions between their names.

A state dict maps names to tensors. The layouts:
- original: the released files; prefixes model.diffusion_model., first_stage_model., cond_stage_model.
- native-mha: the same, with the UNet's attention under the names of nn.MultiheadAttention (the published experiment).
- diffusers: three state dicts, with the names of UNet2DConditionModel, AutoencoderKL and transformers' CLIPTextModel.
Every function takes a state dict and returns a new one of the same dtypes; tensors are shared unless matrices are joined.
Raises CheckpointError for a name that belongs to no network. Sources: huggingface/diffusers, mlfoundations/open_clip.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sd.config.presets import TextKind
from sd.errors import CheckpointError

UNET = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
OPENCLIP = "cond_stage_model.model."
CLIP = "cond_stage_model.transformer."
PREFIXES = {"unet": UNET, "autoencoder": AUTOENCODER}  # the text encoder has either OPENCLIP or CLIP

State = dict[str, Tensor]


def with_prefix(state: State, prefix: str) -> State:
    """The entries whose names start with `prefix`, which is removed."""
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def add_prefix(state: State, prefix: str) -> State:
    """All entries, with `prefix` in front of their names."""
    return {prefix + name: tensor for name, tensor in state.items()}


def text_kind(names: Iterable[str]) -> TextKind | None:
    """Type of the text encoder of an original layout: `openclip` (SD2), `clip` (SD1) or None."""
    names = list(names)
    if any(name.startswith(CLIP) for name in names):
        return "clip"
    return "openclip" if any(name.startswith(OPENCLIP) for name in names) else None


def _get(state: State, name: str) -> Tensor:
    if name not in state:
        raise CheckpointError(f"{name} is missing: the file is incomplete, download it again")
    return state[name]


def _join(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if not q.shape == k.shape == v.shape or not q.dim():
        raise CheckpointError(f"{name} differs from its k and v in shape; download the file again")
    # Some tools store a part of the matrices in half precision; the widest dtype holds all of them exactly.
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if q.is_meta:  # the first torch.cat of meta tensors imports modules for a second
        return torch.empty(3 * len(q), *q.shape[1:], dtype=dtype, device="meta")
    return torch.cat([q.to(dtype), k.to(dtype), v.to(dtype)])


def _inverse(table: dict[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}


# --- original and native-mha


def is_native_mha(names: Iterable[str]) -> bool:
    """Whether the attention has the names of nn.MultiheadAttention."""
    return any(name.startswith(UNET) and ".mha." in name for name in names)


_SEPARATE = re.compile(
    rf"({re.escape(UNET)}.*\.attn[12]\.)(to_q\.weight|to_k\.weight|to_v\.weight|to_out\.0\.(weight|bias))$"
)
_NATIVE = re.compile(rf"({re.escape(UNET)}.*\.attn[12]\.)mha\.(.*)$")


def original_to_native(state: State) -> State:
    """Join to_q, to_k, to_v of self-attention into in_proj_weight; rename those of cross-attention {q,k,v}_proj_weight.

    Like the published converter, it writes no in_proj_bias: q, k and v have no bias.
    """
    result = {}
    for name, tensor in state.items():
        match = _SEPARATE.match(name)
        if not match:
            result[name] = tensor
            continue
        prefix, part = match[1], match[2]
        if part.startswith("to_out"):
            result[f"{prefix}mha.out_proj.{match[3]}"] = tensor
            continue
        q, k, v = (_get(state, f"{prefix}to_{x}.weight") for x in "qkv")
        if q.shape != k.shape:  # a context of another width: nn.MultiheadAttention keeps three matrices
            result[f"{prefix}mha.{part[3]}_proj_weight"] = tensor
        elif part == "to_q.weight":
            result[f"{prefix}mha.in_proj_weight"] = _join(f"{prefix}to_q.weight", q, k, v)
    return result


def native_to_original(state: State) -> State:
    """Invert `original_to_native`; in_proj_bias is accepted if it is zero, as the original layout implies."""
    result = {}
    for name, tensor in state.items():
        match = _NATIVE.match(name)
        if not match:
            result[name] = tensor
            continue
        prefix, part = match[1], match[2]
        if part == "in_proj_weight":
            if tensor.dim() != 2 or tensor.shape[0] % 3:
                raise CheckpointError(
                    f"{name} has the shape {tuple(tensor.shape)}, not three matrices: use the original file"
                )
            result.update({f"{prefix}to_{x}.weight": weight for x, weight in zip("qkv", tensor.chunk(3))})
        elif part in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            result[f"{prefix}to_{part[0]}.weight"] = tensor
        elif part in ("out_proj.weight", "out_proj.bias"):
            result[f"{prefix}to_out.0.{part[9:]}"] = tensor
        elif part != "in_proj_bias":
            raise CheckpointError(f"{name} is no part of nn.MultiheadAttention: use the original file")
        elif not tensor.is_meta and bool(tensor.any()):
            raise CheckpointError(f"{name} is not zero, and Stable Diffusion has no such bias: use the original file")
    return result


# --- text: OpenCLIP's names, which are those of sd.models.text_encoder, and transformers' CLIPTextModel

TEXT_TOP = {  # CLIPTextModel: OpenCLIP
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_TEXT_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_TEXT_TOP_INVERSE, _TEXT_BLOCK_INVERSE = _inverse(TEXT_TOP), _inverse(_TEXT_BLOCK)
_HF_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)$")
_OPENCLIP_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.*?)[._](weight|bias)$")


def hf_text_to_openclip(state: State) -> State:
    """Rename CLIPTextModel, with or without `text_model.`, to OpenCLIP; q, k and v are joined.

    Unknown names (position_ids, a projection, a vision tower) are left unchanged.
    """
    result = {}
    for full, tensor in state.items():
        name = full[len("text_model.") :] if full.startswith("text_model.") else full
        match = _HF_LAYER.match(name)
        if name in TEXT_TOP:
            result[TEXT_TOP[name]] = tensor
        elif match and match[2] in _TEXT_BLOCK:
            result[f"transformer.resblocks.{match[1]}.{_TEXT_BLOCK[match[2]]}.{match[3]}"] = tensor
        elif match and match[2] == "self_attn.q_proj":
            parts = [_get(state, full.replace("q_proj", f"{x}_proj")) for x in "qkv"]
            result[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"] = _join(full, *parts)
        elif not (match and match[2] in ("self_attn.k_proj", "self_attn.v_proj")):
            result[full] = tensor
    return result


def clip_names_to_openclip(state: State) -> State:
    """Give the text encoder of an original layout with transformers' names the names of OpenCLIP, which SD2 has."""
    text = add_prefix(hf_text_to_openclip(with_prefix(state, CLIP)), OPENCLIP)
    text.pop(f"{OPENCLIP}text_model.embeddings.position_ids", None)
    return {**{name: tensor for name, tensor in state.items() if not name.startswith(CLIP)}, **text}


def openclip_text_to_hf(state: State) -> State:
    """Invert `hf_text_to_openclip`, with the prefix `text_model.`; unknown names are left unchanged."""
    result = {}
    for full, tensor in state.items():
        match = _OPENCLIP_BLOCK.match(full)
        layer = f"text_model.encoder.layers.{match[1]}" if match else ""
        if full in _TEXT_TOP_INVERSE:
            result[f"text_model.{_TEXT_TOP_INVERSE[full]}"] = tensor
        elif match and match[2] in _TEXT_BLOCK_INVERSE:
            result[f"{layer}.{_TEXT_BLOCK_INVERSE[match[2]]}.{match[3]}"] = tensor
        elif match and match[2] == "attn.in_proj":
            result.update({f"{layer}.self_attn.{x}_proj.{match[3]}": w for x, w in zip("qkv", tensor.chunk(3))})
        else:
            result[full] = tensor
    return result


# --- original and the networks


def split_networks(state: State) -> tuple[dict[str, State], State]:
    """Split an original or native-mha layout into {unet, autoencoder, text_encoder} and the remaining entries.

    The networks get the names of the modules of `sd`; the remaining entries keep their full names.
    """
    if is_native_mha(state):
        state = native_to_original(state)
    networks = {network: with_prefix(state, prefix) for network, prefix in PREFIXES.items()}
    openclip = with_prefix(state, OPENCLIP)
    networks["text_encoder"] = openclip or hf_text_to_openclip(with_prefix(state, CLIP))
    used = (*PREFIXES.values(), OPENCLIP if openclip else CLIP)
    return networks, {name: tensor for name, tensor in state.items() if not name.startswith(used)}


def join_networks(networks: dict[str, State], kind: TextKind) -> State:
    """Invert `split_networks`: {unet, autoencoder, text_encoder} to the original layout with text encoder `kind`."""
    result = {}
    for network, prefix in PREFIXES.items():
        result.update(add_prefix(networks[network], prefix))
    text = networks["text_encoder"]
    result.update(add_prefix(text, OPENCLIP) if kind == "openclip" else add_prefix(openclip_text_to_hf(text), CLIP))
    return result


# --- the UNet of diffusers; the block numbers follow from the names in the state dict

_RESNET = {  # sd: diffusers
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embedding.cond_proj": "time_embedding.cond_proj",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET_INVERSE, _UNET_TOP_INVERSE = _inverse(_RESNET), _inverse(_UNET_TOP)
_STAGE = re.compile(r"(input_blocks|middle_block|output_blocks)\.(?:(\d{1,4})\.)?(\d{1,4})\.(.*)$")
_BLOCK = re.compile(
    r"(down_blocks|mid_block|up_blocks)\.(?:(\d{1,4})\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d{1,4})\.(.*)$"
)


def _unknown(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} is no part of a Stable Diffusion 1 or 2 network: give a model of these, "
        f"or leave such weights out with --ignore-unknown-keys"
    )


def _rename(name: str, table: dict[str, str], strict: bool = True, whole: str | None = None) -> str:
    """whole: the name in the file, of which `name` is the end."""
    module, _, leaf = name.rpartition(".")
    if module in table:
        return f"{table[module]}.{leaf}"
    if strict:
        raise _unknown(whole or name)
    return name


def unet_to_diffusers(state: State) -> State:
    """Rename sd.models.unet to diffusers' UNet2DConditionModel."""
    # A level is `count` residual blocks and, except in the last, a downsampling with a block number of its own.
    stages = {name: _STAGE.match(name) for name in state}
    inputs = [(int(m[2] or 0), m[4]) for m in stages.values() if m and m[1] == "input_blocks"]
    downs = [block for block, rest in inputs if rest == "op.weight"]
    count = min(downs) - 1 if downs else max((block for block, _ in inputs), default=1)

    def rename(name: str) -> str:
        match = stages[name]
        if not match or name.startswith("input_blocks.0."):
            return _rename(name, _UNET_TOP)
        side, block, part, rest = match[1], int(match[2] or 0), int(match[3]), match[4]
        modules = "resnets" if part == 0 or (side == "middle_block" and part == 2) else "attentions"
        renamed = _rename(rest, _RESNET, whole=name) if modules == "resnets" and not rest.startswith("op.") else rest
        if side == "middle_block":
            return f"mid_block.{modules}.{part // 2}.{renamed}"
        down = side == "input_blocks"
        level, inner = divmod(block - 1 if down else block, count + 1)
        prefix = f"{'down' if down else 'up'}_blocks.{level}"
        if rest.startswith(("op.", "conv.")):
            return f"{prefix}.{'down' if down else 'up'}samplers.0.conv.{rest.partition('.')[2]}"
        return f"{prefix}.{modules}.{inner}.{renamed}"

    return {rename(name): tensor for name, tensor in state.items()}


def unet_from_diffusers(state: State, strict: bool = True) -> State:
    """Invert `unet_to_diffusers`. strict False: unknown names are left unchanged."""
    return {new: state[name] for name, new in unet_names_from_diffusers(state, strict).items()}


def unet_names_from_diffusers(names: Iterable[str], strict: bool = True) -> dict[str, str]:
    """Names of UNet2DConditionModel -> names of sd.models.unet."""
    blocks = {name: _BLOCK.match(name) for name in names}
    parts = [(m[1], int(m[2] or 0), m[3], int(m[4])) for m in blocks.values() if m]
    count = 1 + max(
        (inner for side, _, modules, inner in parts if (side, modules) == ("down_blocks", "resnets")), default=0
    )
    attended = {level for side, level, modules, _ in parts if (side, modules) == ("up_blocks", "attentions")}

    def rename(name: str) -> str:
        match = blocks[name]
        if not match:
            return _rename(name, _UNET_TOP_INVERSE, strict)
        side, level, modules, inner, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
        if modules == "resnets":
            rest = _rename(rest, _RESNET_INVERSE, strict, name)
        if side == "mid_block":
            return f"middle_block.{2 * inner if modules == 'resnets' else 1}.{rest}"
        first = level * (count + 1)
        if modules == "downsamplers":
            return f"input_blocks.{first + count + 1}.0.op.{rest.partition('.')[2]}"
        if modules == "upsamplers":
            return f"output_blocks.{first + count}.{2 if level in attended else 1}.{rest}"
        prefix = f"input_blocks.{first + inner + 1}" if side == "down_blocks" else f"output_blocks.{first + inner}"
        return f"{prefix}.{0 if modules == 'resnets' else 1}.{rest}"

    return {name: rename(name) for name in blocks}


# --- the autoencoder of diffusers, whose attention has matrices instead of 1x1 convolutions

_FIELDS = {
    "stack": r"encoder\.down|decoder\.up",
    "side": "encoder|decoder",
    "level": r"\d{1,4}",  # diffusers counts the levels of the decoder from the other end
    "n": r"\d{1,4}",
    "qkv": "q|k|v",
    "same": r"(?:encoder|decoder)\.conv_(?:in|out)|(?:post_)?quant_conv",
    "rest": ".*",
}
_VAE = [  # sd, diffusers
    ("{stack}.{level}.block.{n}.nin_shortcut.{rest}", "{stack}_blocks.{level}.resnets.{n}.conv_shortcut.{rest}"),
    ("{stack}.{level}.block.{n}.{rest}", "{stack}_blocks.{level}.resnets.{n}.{rest}"),
    ("encoder.down.{level}.downsample.{rest}", "encoder.down_blocks.{level}.downsamplers.0.{rest}"),
    ("decoder.up.{level}.upsample.{rest}", "decoder.up_blocks.{level}.upsamplers.0.{rest}"),
    ("{side}.mid.block_1.{rest}", "{side}.mid_block.resnets.0.{rest}"),
    ("{side}.mid.block_2.{rest}", "{side}.mid_block.resnets.1.{rest}"),
    ("{side}.mid.attn_1.norm.{rest}", "{side}.mid_block.attentions.0.group_norm.{rest}"),
    ("{side}.mid.attn_1.{qkv}.{rest}", "{side}.mid_block.attentions.0.to_{qkv}.{rest}"),
    ("{side}.mid.attn_1.proj_out.{rest}", "{side}.mid_block.attentions.0.to_out.0.{rest}"),
    ("{side}.norm_out.{rest}", "{side}.conv_norm_out.{rest}"),
    ("{same}.{rest}", "{same}.{rest}"),
]
_VAE_BEFORE_0_15 = [  # older diffusers
    ("{side}.mid.attn_1.q.{rest}", "{side}.mid_block.attentions.0.query.{rest}"),
    ("{side}.mid.attn_1.k.{rest}", "{side}.mid_block.attentions.0.key.{rest}"),
    ("{side}.mid.attn_1.v.{rest}", "{side}.mid_block.attentions.0.value.{rest}"),
    ("{side}.mid.attn_1.proj_out.{rest}", "{side}.mid_block.attentions.0.proj_attn.{rest}"),
]


def _pattern(template: str) -> re.Pattern[str]:
    fields = re.sub(r"\\\{(\w+)\\\}", lambda m: f"(?P<{m[1]}>{_FIELDS[m[1]]})", re.escape(template))
    return re.compile(f"{fields}$")


_VAE_TO_DIFFUSERS = [(_pattern(ours), theirs) for ours, theirs in _VAE]
_VAE_FROM_DIFFUSERS = [(_pattern(theirs), ours) for ours, theirs in _VAE + _VAE_BEFORE_0_15]


def _rename_autoencoder(
    names: Iterable[str], rules: list[tuple[re.Pattern[str], str]], strict: bool = True
) -> dict[str, str]:
    matches: dict[str, tuple[dict[str, Any], str]] = {}
    for name in names:
        rule = next(((m.groupdict(), template) for pattern, template in rules if (m := pattern.match(name))), None)
        if rule is None and strict:
            raise _unknown(name)
        matches[name] = rule or ({"unknown": name}, "{unknown}")
    levels = 1 + max((int(fields["level"]) for fields, _ in matches.values() if "level" in fields), default=0)
    for name, (fields, _) in matches.items():
        if "level" in fields and name.startswith("decoder."):
            fields["level"] = levels - 1 - int(fields["level"])
    return {name: template.format(**fields) for name, (fields, template) in matches.items()}


def autoencoder_to_diffusers(state: State) -> State:
    """Rename sd.models.autoencoder to diffusers' AutoencoderKL; the 1x1 convolutions of its attention become matrices."""
    renamed = {new: state[name] for name, new in _rename_autoencoder(state, _VAE_TO_DIFFUSERS).items()}
    return {name: w.flatten(1) if ".attentions." in name and w.dim() == 4 else w for name, w in renamed.items()}


def autoencoder_from_diffusers(state: State, strict: bool = True) -> State:
    """Invert `autoencoder_to_diffusers`; the older names (query, key, value, proj_attn) are accepted too.

    strict False: unknown names are left unchanged.
    """
    renamed = {new: state[name] for name, new in autoencoder_names_from_diffusers(state, strict).items()}
    return attention_as_convolutions(renamed)


def autoencoder_names_from_diffusers(names: Iterable[str], strict: bool = True) -> dict[str, str]:
    """Names of AutoencoderKL, of any version of diffusers -> names of sd.models.autoencoder."""
    return _rename_autoencoder(names, _VAE_FROM_DIFFUSERS, strict)


def attention_as_convolutions(state: State) -> State:
    """Give the autoencoder's attention, with or without a prefix, its shape in the original layout: 1x1 convolutions."""
    return {name: w[:, :, None, None] if ".mid.attn_1." in name and w.dim() == 2 else w for name, w in state.items()}
