"""`--optimise`: a preset, names of techniques, or a preset and names of techniques that change it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sd.choices import COMPILE_MODES, INDUCTOR_OPTIONS, OPTIMISE_PRESETS, PRECISIONS, RUNTIMES, SDPA_KERNELS
from sd.errors import ConfigError
from sd.features import computes_slowly, has
from sd.optimise.compile import CUDA_GRAPH_MODES
from sd.optimise.optimisations import OWN_KERNELS, WEIGHT_DTYPES, Optimisations, can_compile_ahead

# Fields of Optimisations by the name of the technique that sets them.
TECHNIQUES: dict[str, dict[str, object]] = {
    **{name: {"precision": name} for name in PRECISIONS},
    **{name: {name: True} for name in ("tf32", "cudnn_benchmark", "channels_last", "fused_qkv", "fused_kv")},
    "packed": {"packed": True, "channels_last": True},
    "avx2_layers": {"avx2_layers": True, "precision": "full", "channels_last": True},
    "avx2_attention": {"avx2_attention": True, "precision": "full", "attention": "sdpa"},
    "avx512_layers": {"avx512_layers": True, "precision": "bf16", "channels_last": True},
    "avx512_attention": {"avx512_attention": True, "precision": "bf16", "attention": "sdpa"},
    "whole_norms": {"whole_norms": True},
    "nhwc_norms": {"nhwc_norms": True, "channels_last": True},
    "separate_bias": {"separate_bias": True},
    "folded_projections": {"folded_projections": True},
    **{name: {name: True} for name in ("cache_context_kv", "cache_time_embeddings", "shared_guidance")},
    "compile": {"compile": "default"},
    **{mode: {"compile": mode} for mode in COMPILE_MODES if mode not in ("none", "default")},
    "compile_blocks": {"compile_scope": "blocks"},
    "compile_step": {"compile_scope": "step"},
    "compile_autoencoder": {"compile_autoencoder": "default"},
    "compile_text_encoder": {"compile_text_encoder": "default"},
    **{name: {"inductor": (name,)} for name in INDUCTOR_OPTIONS},
    # Its kernels are candidates of max-autotune alone.
    "persistent_tma_matmul": {"inductor": ("persistent_tma_matmul",), "compile": "max-autotune-no-cudagraphs"},
    "cuda_graph_unet": {"cuda_graph": "unet"},
    "cuda_graph_networks": {"cuda_graph": "networks"},
    "cuda_graph_loop": {"cuda_graph": "loop"},
    "original_steps": {"original_steps": True},
    # approximate
    "token_merging": {"token_merging": 0.5},
    "feature_caching": {"feature_caching": 3},
    "int8": {"quantisation": "int8"},
    "fp8": {"quantisation": "fp8"},
}


def parse(
    text: str, device: torch.device | str, changes: dict[str, Any] | None = None, narrow: bool = False
) -> Optimisations:
    """Optimisations from `none`, `original`, `fast`, comma-separated names of TECHNIQUES, or a preset and such names.

    A compile scope or an inductor option implies compile mode `default` if no mode is named. Fields of `fast` that
    contradict a named technique are reset. changes: fields that override the text. narrow: of Optimisations.fast.
    Raises ConfigError for unknown names and contradictions; sd.optimise.apply.require_available checks the machine.
    """
    names = text.split(",")
    base = Optimisations.none()
    if names[0] in OPTIMISE_PRESETS:
        preset = names.pop(0)
        if preset == "fast":  # with fp32 by name, its kernels are chosen
            base = Optimisations.fast(device, narrow or "full" in (*names, (changes or {}).get("precision")))
        base = Optimisations.original() if preset == "original" else base
    fields: dict[str, Any] = {}
    for name in names:
        if name not in TECHNIQUES:
            raise ConfigError(
                f"optimise {name!r}: choose a preset ({', '.join(OPTIMISE_PRESETS)}), which comes first, "
                f"or of {', '.join(TECHNIQUES)}"
            )
        for field, value in TECHNIQUES[name].items():
            if isinstance(value, tuple):
                value = (*fields.get(field, ()), *value)
            elif fields.get(field, value) != value:
                raise ConfigError(f"optimise {text}: {field} is both {fields[field]} and {value}: choose one of them")
            fields[field] = value
    compiles_another = {"compile_autoencoder", "compile_text_encoder"} & set(fields)
    of_compiler = {"inductor", "whole_norms", "nhwc_norms"} & set(fields)
    implies_compile = bool({"compile_scope", "separate_bias"} & set(fields)) or bool(
        of_compiler and not compiles_another
    )
    if implies_compile and base.compile == "none":
        fields.setdefault("compile", "default")
    fields.update(changes or {})
    return replace(base, **{**_resets(base, fields), **fields})


def _resets(base: Optimisations, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of `fast` that contradict `fields`, at their defaults."""
    resets: dict[str, Any] = {}
    other_precision = {
        name: False for name in OWN_KERNELS if fields.get("precision", OWN_KERNELS[name]) != OWN_KERNELS[name]
    }
    if base.avx2_layers and "avx2_layers" in other_precision:
        resets.update(packed=has("packed"))
    resets.update(other_precision)
    if "quantisation" in fields:
        resets.update(fused_qkv=False, fused_kv=False, packed=False, avx2_layers=False, folded_projections=False)
    if fields.get("precision") == "autocast" or "freezing" in fields.get("inductor", ()):
        resets.update(packed=False, avx2_layers=False, avx512_layers=False)
    if fields.get("packed") or fields.get("avx2_layers"):
        # By name, `packed` is for all layers, so that it can be compared.
        resets.update(packed=False, avx2_layers=False, avx512_layers=False)
    if any(map(fields.get, ("packed", "avx2_layers", "avx512_layers"))):
        resets.update(separate_bias=False, folded_projections=False)
    other_kernels = tuple(fields.get("sdpa_kernels", SDPA_KERNELS)) != SDPA_KERNELS
    if other_kernels or fields.get("attention", "sdpa") != "sdpa":
        resets.update(avx2_attention=False, avx512_attention=False)
    if computes_slowly(WEIGHT_DTYPES[fields.get("precision", "full")]):
        resets.update(packed=False)
    networks = ("compile", "compile_autoencoder", "compile_text_encoder")
    nothing_compiled = all(fields.get(name) == "none" for name in networks)
    if nothing_compiled or fields.get("compile_backend", "inductor") != "inductor":
        resets.update(whole_norms=False)
    of_parts = fields.get("compile_scope") == "blocks" or fields.get("compile_backend") in RUNTIMES
    if of_parts or nothing_compiled or fields.get("channels_last") is False:
        resets.update(nhwc_norms=False)
    if of_parts or fields.get("compile", base.compile) == "none":
        resets.update(separate_bias=False, folded_projections=False)
    if fields.get("attention") == "mha":
        resets.update(fused_qkv=False, fused_kv=False, cache_context_kv=False)
    if "original_steps" in fields:
        resets.update(cache_context_kv=False, cache_time_embeddings=False, shared_guidance=False, cuda_graph="none")
    if fields.get("separate_bias") or fields.get("folded_projections"):
        resets.update(packed=False, avx2_layers=False, avx512_layers=False)
    if fields.get("compile_backend", "inductor") in RUNTIMES:
        resets.update(packed=False, **dict.fromkeys(OWN_KERNELS, False))
        if fields["compile_backend"] == "onnxrt":
            resets.update(precision="full")
    others = {fields.get("compile_autoencoder"), fields.get("compile_text_encoder")}
    if base.cuda_graph == "networks" and others & set(CUDA_GRAPH_MODES):
        resets.update(cuda_graph="unet")
    records_graphs = fields.get("compile") in CUDA_GRAPH_MODES
    if records_graphs or fields.get("compile_scope") == "step" or fields.get("precision") == "autocast":
        resets.update(cuda_graph="none")
    if base.compile_backend == "aotinductor" and not can_compile_ahead({**vars(base), **resets, **fields}):
        resets.update(compile_backend="inductor")
    return resets
