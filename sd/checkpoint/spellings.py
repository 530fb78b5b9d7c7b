"""Names that other tools give to the weights in single files, mapped to the names of the original layout.

Read are the spellings of diffusers' single-file loader, AUTOMATIC1111's web UI and ComfyUI for Stable Diffusion 1 and 2:
other prefixes, modules wrapped by torch.compile or DistributedDataParallel, diffusers' names behind a prefix, and the
autoencoder's attention under the names of three versions of diffusers. Only names are mapped here; `sd.checkpoint.layouts`
joins tensors, and `sd.checkpoint.load` compares shapes.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from sd.checkpoint import layouts
from sd.checkpoint.layouts import AUTOENCODER, CLIP, OPENCLIP, UNET

V_PREDICTION_MARKERS = ("v_pred", f"{UNET}v_pred")  # empty tensors, which ComfyUI and trainers write and read
ZERO_SNR_MARKERS = ("ztsnr", f"{UNET}ztsnr")

_ALIASES = (  # prefix in the file, prefix in the original layout
    ("conditioner.embedders.0.model.", OPENCLIP),  # Stability's generative-models
    ("conditioner.embedders.0.transformer.", CLIP),
    ("cond_stage_model.clip_l.transformer.", CLIP),  # ComfyUI
    ("cond_stage_model.clip_h.transformer.", CLIP),
    ("clip_l.transformer.", CLIP),
    ("clip_h.transformer.", CLIP),
    ("text_encoder.", CLIP),  # state dicts of a whole diffusers pipeline
    ("vae.", AUTOENCODER),
    ("unet.", UNET),
    ("diffusion_model.", UNET),
)
_HF_IN_OPENCLIP = (
    f"{OPENCLIP}transformer.text_model."  # an old converter of diffusers renamed a part of the tower alone
)
_VAE_ATTENTION = re.compile(
    rf"({re.escape(AUTOENCODER)}(?:en|de)coder\.mid\.attn_1\.)"
    r"(to_[qkv]|query|key|value|to_out\.0|proj_attn|group_norm)\.(weight|bias)$"
)
_VAE_ATTENTION_PARTS = {
    **{f"to_{x}": x for x in "qkv"},
    "query": "q",
    "key": "k",
    "value": "v",
    "to_out.0": "proj_out",
    "proj_attn": "proj_out",
    "group_norm": "norm",
}
_WRAPPERS = re.compile(r"^module\.|(?<![^.])_orig_mod\.")  # DistributedDataParallel, torch.compile


def prefixes(network: str) -> tuple[str, ...]:
    """Prefixes of a network's weights in the original layout."""
    return (layouts.PREFIXES[network],) if network in layouts.PREFIXES else (OPENCLIP, CLIP)


def original_names(names: Collection[str], network: str | None = None, strict: bool = True) -> dict[str, str]:
    """Names of a single file -> names of the original layout; unknown names are mapped to themselves.

    network: the file is of this network alone (`unet`, `autoencoder`, `text_encoder`) and may lack the prefix. A file of
    a UNet alone is detected. Of two names for the same weight the original one is used, and the other left unchanged.
    strict False: unknown names inside a network in diffusers' layout are left unchanged instead of raising CheckpointError.
    """
    renamed = {name: _WRAPPERS.sub("", name) for name in names}
    plain = set(renamed.values())
    if network is None and f"{UNET}input_blocks.0.0.weight" not in plain:
        bare = "input_blocks.0.0.weight" in plain
        diffusers = "conv_in.weight" in plain and any(name.startswith("down_blocks.") for name in plain)
        if (bare or diffusers) and "controlnet_cond_embedding.conv_in.weight" not in plain:
            network = "unet"
    prefix = ""
    if network is not None and not any(name.startswith(_known_prefixes(network)) for name in plain):
        openclip = any(".resblocks." in name for name in plain)
        prefix = layouts.PREFIXES.get(network, OPENCLIP if openclip else CLIP)
    whole = any(name.startswith(_known_prefixes("unet")) for name in plain) or network is not None
    resblocks = any(name.startswith(f"{OPENCLIP}transformer.resblocks.") for name in plain)
    renamed = {name: _rename(prefix + new, whole, resblocks) for name, new in renamed.items()}
    for prefix, convert in (
        (UNET, layouts.unet_names_from_diffusers),
        (AUTOENCODER, layouts.autoencoder_names_from_diffusers),
    ):
        inner = {name: new[len(prefix) :] for name, new in renamed.items() if new.startswith(prefix)}
        if any(re.match(r"((en|de)coder\.)?(down_blocks|mid_block|up_blocks)\.", new) for new in inner.values()):
            table = convert(inner.values(), strict)
            renamed.update({name: prefix + table[new] for name, new in inner.items()})
    taken = {name for name, new in renamed.items() if name == new}
    result = {}
    for name, new in renamed.items():
        result[name] = name if new != name and new in taken else new
        taken.add(result[name])
    return result


def _known_prefixes(network: str) -> tuple[str, ...]:
    own = prefixes(network)
    return (*own, *(alias for alias, prefix in _ALIASES if prefix in own))


def _rename(name: str, whole: bool, resblocks: bool) -> str:
    if name.startswith(_HF_IN_OPENCLIP):
        rest = name[len(_HF_IN_OPENCLIP) :]
        return OPENCLIP + layouts.TEXT_TOP.get(rest, rest) if resblocks else f"{CLIP}text_model.{rest}"
    for alias, prefix in _ALIASES:
        if name.startswith(alias) and whole:
            name = prefix + name[len(alias) :]
            break
    match = _VAE_ATTENTION.match(name)
    return f"{match[1]}{_VAE_ATTENTION_PARTS[match[2]]}.{match[3]}" if match else name
