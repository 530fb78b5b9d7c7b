"""Techniques by the names that `--optimise` takes: a preset, techniques, or a preset and techniques that change it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sd.choices import COMPILE_MODES, INDUCTOR_OPTIONS, PRECISIONS, PRESETS
from sd.errors import ConfigError
from sd.optimise.compile import GRAPH_MODES
from sd.optimise.optimisations import Optimisations

# The fields that each name sets.
TECHNIQUES: dict[str, dict[str, object]] = {
    **{name: {"precision": name} for name in PRECISIONS},
    "tf32": {"tf32": True},
    "channels_last": {"channels_last": True},
    "fused_qkv": {"fused_qkv": True},
    "fused_kv": {"fused_kv": True},
    "cache_context_kv": {"cache_context_kv": True},
    "cache_time_embeddings": {"cache_time_embeddings": True},
    "triton_group_norm": {"triton_group_norm": True},
    "triton_geglu": {"triton_geglu": True},
    "compile": {"compile": "default"},
    **{mode: {"compile": mode} for mode in COMPILE_MODES if mode not in ("none", "default")},
    "compile_blocks": {"compile_scope": "blocks"},
    "compile_step": {"compile_scope": "step"},
    "compile_autoencoder": {"compile_autoencoder": "default"},
    "compile_text_encoder": {"compile_text_encoder": "default"},
    **{name: {"inductor": (name,)} for name in INDUCTOR_OPTIONS},
    "cuda_graph_unet": {"cuda_graph": "unet"},
    "cuda_graph_loop": {"cuda_graph": "loop"},
    "original_steps": {"original_steps": True},
    # approximate
    "token_merging": {"token_merging": 0.5},
    "feature_caching": {"feature_caching": 3},
    "int8": {"quantisation": "int8"},
    "fp8": {"quantisation": "fp8"},
}


def parse(text: str, device: torch.device | str, changes: dict[str, Any] | None = None) -> Optimisations:
    """`fast`, `none`, `original`, names of TECHNIQUES with commas between, or a preset and then such names.

    A scope or an option of the compiler brings mode `default` where none is chosen, and what of `fast` cannot go with
    the names gives way to them. changes: fields over all that, which other options chose. Raises ConfigError for unknown
    names and contradictions; whether it can run here is not decided here (sd.optimise.optimisations.require_available).
    """
    names = text.split(",")
    base = Optimisations()
    if names[0] in PRESETS:
        preset = names.pop(0)
        base = {"none": Optimisations.none, "original": Optimisations.original}.get(
            preset, lambda: Optimisations.fast(device)
        )()
    fields: dict[str, Any] = {}
    for name in names:
        if name not in TECHNIQUES:
            raise ConfigError(
                f"optimise {name!r}: choose a preset ({', '.join(PRESETS)}), which comes first, or of {', '.join(TECHNIQUES)}"
            )
        for field, value in TECHNIQUES[name].items():
            if isinstance(value, tuple):
                value = (*fields.get(field, ()), *value)
            elif fields.get(field, value) != value:
                raise ConfigError(f"optimise {text}: {field} is both {fields[field]} and {value}: give one of them")
            fields[field] = value
    options_of_another = "inductor" in fields and {"compile_autoencoder", "compile_text_encoder"} & set(fields)
    asks = "compile_scope" in fields or ("inductor" in fields and not options_of_another)
    if asks and base.compile == "none":
        fields.setdefault("compile", "default")
    fields.update(changes or {})
    return replace(base, **{**_giving_way(fields), **fields})


def _giving_way(fields: dict[str, Any]) -> dict[str, Any]:
    """What of `fast` cannot go with these fields, at what it is without a preset (sd.optimise.optimisations says why)."""
    given_up: dict[str, Any] = {}
    if "quantisation" in fields:
        given_up.update(fused_qkv=False, fused_kv=False)
    if fields.get("attention") == "mha":
        given_up.update(fused_qkv=False, fused_kv=False, cache_context_kv=False)
    if "original_steps" in fields:
        given_up.update(cache_context_kv=False, cache_time_embeddings=False, cuda_graph="none")
    records_itself = fields.get("compile") in GRAPH_MODES
    if records_itself or fields.get("compile_scope") == "step" or fields.get("precision") == "autocast":
        given_up.update(cuda_graph="none")
    return given_up
