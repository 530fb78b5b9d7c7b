"""Key layouts of one model, and pure functions between them: exact, reversible, dtype for dtype.

A state dict maps names to tensors. The layouts:
- original: the released files; prefixes model.diffusion_model., first_stage_model., cond_stage_model.
- native-mha: the same, with the UNet's attention under the names of nn.MultiheadAttention (the published experiment).
- diffusers: three state dicts, with the names of UNet2DConditionModel, AutoencoderKL and transformers' CLIPTextModel.
Every function takes a state dict and returns a new one; the tensors are shared unless matrices are joined.
Sources: huggingface/diffusers and mlfoundations/open_clip for their module names.
"""

from __future__ import annotations

import re

import torch

from sd.errors import CheckpointError

UNET = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
OPENCLIP = "cond_stage_model.model."
CLIP = "cond_stage_model.transformer."
PREFIXES = {"unet": UNET, "autoencoder": AUTOENCODER}  # the text encoder has one of two

State = dict[str, torch.Tensor]


def with_prefix(state: State, prefix: str) -> State:
    """The entries under `prefix`, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def add_prefix(state: State, prefix: str) -> State:
    """All entries, with `prefix` in front."""
    return {prefix + name: tensor for name, tensor in state.items()}


def text_kind(names) -> str | None:
    """`openclip` (SD2), `clip` (SD1) or None, by the names of an original layout."""
    if any(name.startswith(CLIP) for name in names):
        return "clip"
    return "openclip" if any(name.startswith(OPENCLIP) for name in names) else None


def _must(state: State, name: str) -> torch.Tensor:
    try:
        return state[name]
    except KeyError:
        raise CheckpointError(f"{name} is missing: the file is incomplete, take it again from its source") from None


def _join(name: str, q, k, v) -> torch.Tensor:
    if not q.shape == k.shape == v.shape or not q.dim() or len({q.dtype, k.dtype, v.dtype}) != 1:
        raise CheckpointError(f"{name} differs from its k and v in shape or dtype; take the file again from its source")
    return torch.cat([q, k, v])


# --- original and native-mha


def is_native_mha(names) -> bool:
    """Whether the attention is under the names of nn.MultiheadAttention."""
    return any(name.startswith(UNET) and ".mha." in name for name in names)


_SEPARATE = re.compile(
    rf"({re.escape(UNET)}.*\.attn[12]\.)(to_q\.weight|to_k\.weight|to_v\.weight|to_out\.0\.(weight|bias))$"
)
_NATIVE = re.compile(rf"({re.escape(UNET)}.*\.attn[12]\.)mha\.(.*)$")


def original_to_native(state: State) -> State:
    """Join to_q, to_k, to_v of self-attention into in_proj_weight; name those of cross-attention {q,k,v}_proj_weight.

    As the published converter, it writes no in_proj_bias: q, k and v have no bias.
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
        q, k, v = (_must(state, f"{prefix}to_{x}.weight") for x in "qkv")
        if q.shape != k.shape:  # another width of context: nn.MultiheadAttention keeps three matrices
            result[f"{prefix}mha.{part[3]}_proj_weight"] = tensor
        elif part == "to_q.weight":
            result[f"{prefix}mha.in_proj_weight"] = _join(f"{prefix}to_q.weight", q, k, v)
    return result


def native_to_original(state: State) -> State:
    """The inverse of `original_to_native`; in_proj_bias may be there if it is zero, as the original layout implies."""
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
                    f"{name} has the shape {tuple(tensor.shape)}, not three matrices: take the original file"
                )
            for x, weight in zip("qkv", tensor.chunk(3)):
                result[f"{prefix}to_{x}.weight"] = weight
        elif part in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            result[f"{prefix}to_{part[0]}.weight"] = tensor
        elif part in ("out_proj.weight", "out_proj.bias"):
            result[f"{prefix}to_out.0.{part[9:]}"] = tensor
        elif part != "in_proj_bias":
            raise CheckpointError(f"{name} is no part of nn.MultiheadAttention: take the original file")
        elif bool(tensor.any()):
            raise CheckpointError(f"{name} is not zero, and Stable Diffusion has no such bias: take the original file")
    return result


# --- text: OpenCLIP's names, which are those of sd.models.text_encoder, and transformers' CLIPTextModel

_TEXT_TOP = {
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
_TEXT_TOP_BACK = {theirs: ours for ours, theirs in _TEXT_TOP.items()}
_TEXT_BLOCK_BACK = {theirs: ours for ours, theirs in _TEXT_BLOCK.items()}
_HF_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)$")
_OPENCLIP_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.*?)[._](weight|bias)$")


def hf_text_to_openclip(state: State) -> State:
    """Names of CLIPTextModel, with or without `text_model.`, to those of OpenCLIP; q, k and v are joined.

    Names that it does not know (position_ids, a projection, a vision tower) stay as they are.
    """
    result = {}
    for full, tensor in state.items():
        name = full[len("text_model.") :] if full.startswith("text_model.") else full
        match = _HF_LAYER.match(name)
        if name in _TEXT_TOP:
            result[_TEXT_TOP[name]] = tensor
        elif match and match[2] in _TEXT_BLOCK:
            result[f"transformer.resblocks.{match[1]}.{_TEXT_BLOCK[match[2]]}.{match[3]}"] = tensor
        elif match and match[2] == "self_attn.q_proj":
            parts = [_must(state, full.replace("q_proj", f"{x}_proj")) for x in "qkv"]
            result[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"] = _join(full, *parts)
        elif not (match and match[2] in ("self_attn.k_proj", "self_attn.v_proj")):
            result[full] = tensor
    return result


def openclip_text_to_hf(state: State) -> State:
    """The inverse of `hf_text_to_openclip`, with `text_model.` in front; names it does not know stay as they are."""
    result = {}
    for full, tensor in state.items():
        match = _OPENCLIP_BLOCK.match(full)
        if full in _TEXT_TOP_BACK:
            result[f"text_model.{_TEXT_TOP_BACK[full]}"] = tensor
        elif match and match[2] in _TEXT_BLOCK_BACK:
            result[f"text_model.encoder.layers.{match[1]}.{_TEXT_BLOCK_BACK[match[2]]}.{match[3]}"] = tensor
        elif match and match[2] == "attn.in_proj":
            for x, part in zip("qkv", tensor.chunk(3)):
                result[f"text_model.encoder.layers.{match[1]}.self_attn.{x}_proj.{match[3]}"] = part
        else:
            result[full] = tensor
    return result


# --- original and the networks


def split_networks(state: State) -> tuple[dict[str, State], State]:
    """Original layout (attention in either) -> ({unet, autoencoder, text_encoder}, all that belongs to none of them).

    The networks get the names of the modules of `sd`; what is left over keeps its full name.
    """
    if is_native_mha(state):
        state = native_to_original(state)
    networks = {name: with_prefix(state, prefix) for name, prefix in PREFIXES.items()}
    text = with_prefix(state, OPENCLIP)
    networks["text_encoder"] = text if text else hf_text_to_openclip(with_prefix(state, CLIP))
    used = (*PREFIXES.values(), OPENCLIP if text else CLIP)
    return networks, {name: tensor for name, tensor in state.items() if not name.startswith(used)}


def join_networks(networks: dict[str, State], kind: str) -> State:
    """The inverse of `split_networks`: {unet, autoencoder, text_encoder} to the original layout of text kind `kind`."""
    result = {}
    for name, prefix in PREFIXES.items():
        result.update(add_prefix(networks[name], prefix))
    text = networks["text_encoder"]
    result.update(add_prefix(text, OPENCLIP) if kind == "openclip" else add_prefix(openclip_text_to_hf(text), CLIP))
    return result


# --- the UNet and the autoencoder of diffusers; the block numbers follow from the names in the state itself

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_RESNET_BACK = {theirs: ours for ours, theirs in _RESNET.items()}
_UNET_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_TOP_BACK = {theirs: ours for ours, theirs in _UNET_TOP.items()}
_STAGE = re.compile(r"(input_blocks|middle_block|output_blocks)\.(?:(\d+)\.)?(\d+)\.(.*)$")
_BLOCKS = re.compile(
    r"(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)$"
)


def _unknown(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} is no part of a Stable Diffusion 1 or 2 network; take the file again from its source"
    )


def _rename(name: str, table: dict[str, str]) -> str:
    module, _, leaf = name.rpartition(".")
    try:
        return f"{table[module]}.{leaf}"
    except KeyError:
        raise _unknown(name) from None


def unet_to_diffusers(state: State) -> State:
    """Names of sd.models.unet to those of diffusers' UNet2DConditionModel."""
    # A level is `count` residual blocks and, in all but the last, a downsampling with a block number of its own.
    downs = [
        int(name.split(".")[1]) for name in state if name.startswith("input_blocks.") and name.endswith(".0.op.weight")
    ]
    inputs = [int(name.split(".")[1]) for name in state if name.startswith("input_blocks.")]
    count = min(downs) - 1 if downs else max(inputs, default=1)
    result = {}
    for name, tensor in state.items():
        match = _STAGE.match(name)
        if not match or name.startswith("input_blocks.0."):
            result[_rename(name, _UNET_TOP)] = tensor
            continue
        side, block, part, rest = match[1], int(match[2] or 0), int(match[3]), match[4]
        kind = "resnets" if part == 0 or (side == "middle_block" and part == 2) else "attentions"
        if side == "middle_block":
            prefix = f"mid_block.{kind}.{part // 2}"
        else:
            level, inner = divmod(block - 1 if side == "input_blocks" else block, count + 1)
            blocks = "down_blocks" if side == "input_blocks" else "up_blocks"
            prefix = f"{blocks}.{level}.{kind}.{inner}"
            if rest.startswith(("op.", "conv.")):
                sampler = "downsamplers" if side == "input_blocks" else "upsamplers"
                result[f"{blocks}.{level}.{sampler}.0.conv.{rest.partition('.')[2]}"] = tensor
                continue
        result[f"{prefix}.{_rename(rest, _RESNET) if kind == 'resnets' else rest}"] = tensor
    return result


def unet_from_diffusers(state: State) -> State:
    """The inverse of `unet_to_diffusers`."""
    matches = {name: _BLOCKS.match(name) for name in state}
    count = 1 + max(
        (int(m[4]) for m in matches.values() if m and m[1] == "down_blocks" and m[3] == "resnets"), default=0
    )
    attended = {int(m[2]) for m in matches.values() if m and m[1] == "up_blocks" and m[3] == "attentions"}
    result = {}
    for name, tensor in state.items():
        match = matches[name]
        if not match:
            result[_rename(name, _UNET_TOP_BACK)] = tensor
            continue
        side, level, kind, inner, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
        if kind == "resnets":
            rest = _rename(rest, _RESNET_BACK)
        if side == "mid_block":
            part = 2 * inner if kind == "resnets" else 1
            result[f"middle_block.{part}.{rest}"] = tensor
        elif kind == "downsamplers":
            result[f"input_blocks.{(level + 1) * (count + 1)}.0.op.{rest.partition('.')[2]}"] = tensor
        elif kind == "upsamplers":
            result[f"output_blocks.{level * (count + 1) + count}.{2 if level in attended else 1}.{rest}"] = tensor
        else:
            part = 0 if kind == "resnets" else 1
            block = level * (count + 1) + inner
            prefix = f"input_blocks.{block + 1}" if side == "down_blocks" else f"output_blocks.{block}"
            result[f"{prefix}.{part}.{rest}"] = tensor
    return result


_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_ATTENTION_BACK = {theirs: ours for ours, theirs in _VAE_ATTENTION.items()}
_VAE_ATTENTION_BACK.update(query="q", key="k", value="v", proj_attn="proj_out")  # diffusers before 0.15
_VAE_TOP = re.compile(r"((encoder|decoder)\.conv_(in|out)|(post_)?quant_conv)\.(weight|bias)$")
_VAE_OURS = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(?:block\.(\d+)\.(.*)|(?:down|up)sample\.(conv\..*))$")
_VAE_THEIRS = re.compile(
    r"(encoder\.down_blocks|decoder\.up_blocks)\.(\d+)\.(?:resnets\.(\d+)\.(.*)|(?:down|up)samplers\.0\.(conv\..*))$"
)
_VAE_MID_OURS = re.compile(r"(encoder|decoder)\.mid\.(block_[12]|attn_1)\.(.*)$")
_VAE_MID_THEIRS = re.compile(r"(encoder|decoder)\.mid_block\.(resnets\.[01]|attentions\.0)\.(.*)$")


def autoencoder_to_diffusers(state: State) -> State:
    """Names of sd.models.autoencoder to those of diffusers' AutoencoderKL; its attention is linear, not 1x1 convolutions."""
    levels = 1 + max((int(m[2]) for m in map(_VAE_OURS.match, state) if m), default=0)
    result = {}
    for name, tensor in state.items():
        block, mid = _VAE_OURS.match(name), _VAE_MID_OURS.match(name)
        if block:
            level = int(block[2]) if block[1] == "encoder.down" else levels - 1 - int(block[2])
            if block[3] is not None:
                part = f"resnets.{block[3]}.{block[4].replace('nin_shortcut', 'conv_shortcut')}"
            else:
                part = f"{'down' if block[1] == 'encoder.down' else 'up'}samplers.0.{block[5]}"
            result[f"{block[1]}_blocks.{level}.{part}"] = tensor
        elif mid and mid[2] == "attn_1":
            matrix = tensor.flatten(1) if tensor.dim() == 4 else tensor
            result[f"{mid[1]}.mid_block.attentions.0.{_rename(mid[3], _VAE_ATTENTION)}"] = matrix
        elif mid:
            result[f"{mid[1]}.mid_block.resnets.{int(mid[2][-1]) - 1}.{mid[3]}"] = tensor
        elif name.startswith(("encoder.norm_out.", "decoder.norm_out.")):
            result[name.replace("norm_out", "conv_norm_out")] = tensor
        elif _VAE_TOP.match(name):
            result[name] = tensor
        else:
            raise _unknown(name)
    return result


def autoencoder_from_diffusers(state: State) -> State:
    """The inverse of `autoencoder_to_diffusers`; also takes the older names (query, key, value, proj_attn)."""
    levels = 1 + max((int(m[2]) for m in map(_VAE_THEIRS.match, state) if m), default=0)
    result = {}
    for name, tensor in state.items():
        block, mid = _VAE_THEIRS.match(name), _VAE_MID_THEIRS.match(name)
        if block:
            side = "encoder.down" if block[1] == "encoder.down_blocks" else "decoder.up"
            level = int(block[2]) if side == "encoder.down" else levels - 1 - int(block[2])
            if block[3] is not None:
                part = f"block.{block[3]}.{block[4].replace('conv_shortcut', 'nin_shortcut')}"
            else:
                part = f"{'down' if side == 'encoder.down' else 'up'}sample.{block[5]}"
            result[f"{side}.{level}.{part}"] = tensor
        elif mid and mid[2] == "attentions.0":
            matrix = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
            result[f"{mid[1]}.mid.attn_1.{_rename(mid[3], _VAE_ATTENTION_BACK)}"] = matrix
        elif mid:
            result[f"{mid[1]}.mid.block_{int(mid[2][-1]) + 1}.{mid[3]}"] = tensor
        elif name.startswith(("encoder.conv_norm_out.", "decoder.conv_norm_out.")):
            result[name.replace("conv_norm_out", "norm_out")] = tensor
        elif _VAE_TOP.match(name):
            result[name] = tensor
        else:
            raise _unknown(name)
    return result
