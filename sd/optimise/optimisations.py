"""How a model is run: one field per technique, and the one function that applies them to a loaded model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any

import torch

from sd.attention.functions import DEFAULT_ATTENTION, Attention
from sd.choices import (
    ATTENTION_PRECISIONS,
    COMPILE_BACKENDS,
    COMPILE_MODES,
    COMPILE_SCOPES,
    CUDA_GRAPHS,
    PRECISIONS,
    QUANTISATIONS,
    SDPA_KERNELS,
)
from sd.errors import ConfigError
from sd.features import has
from sd.models.token_merging import MAX_RATIO
from sd.optimise.compile import (
    GRAPH_MODES,
    Compiler,
    cpp_compiler,
)

WEIGHT_DTYPES = {"full": torch.float32, "autocast": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What PyTorch itself does with fp32 on a GPU: convolutions in tf32, matrix products not.
_TF32_DEFAULTS = {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32}


@dataclass(frozen=True)
class Optimisations:
    """What to run a model with. Everything is asked for by name; what cannot run here raises Unavailable.

    attention: `original`, `xformers`, `mha` or `sdpa`. sdpa_kernels: those allowed in `mha` and `sdpa`.
    attention_precision: `fp32` upcasts the original's q and k, `input` does not. precision: `full` (fp32),
    `autocast` (fp32 weights; fp16 on CUDA, bf16 on a CPU), `fp16` and `bf16` (pure half weights). tf32: fp32 matrix
    products of a GPU round their inputs too, not only its convolutions.

    channels_last: weights and activations of all convolutions in NHWC. fused_qkv, fused_kv: one product for q, k, v of
    self-attention; for k, v of cross-attention. cache_context_kv: keys and values of the prompt once per prompt.
    cache_time_embeddings: time embeddings and their projections of all timesteps once per run. triton_group_norm,
    triton_geglu: our own kernels for each group norm with what is added before and the SiLU after it, of UNet and
    autoencoder, and for the gated GELU (sd.optimise.kernels).

    compile: mode of torch.compile for compile_scope, which is `unet` (one graph), `blocks` (regional: each ResBlock and
    transformer block) or `step` (UNet, guidance and sampler update in one graph). compile_autoencoder (the decoder)
    and compile_text_encoder: modes of their own. compile_backend: `inductor`, or `aot_eager` and `eager` to look for a
    fault. inductor: options of it by name (sd.optimise.compile.INDUCTOR_OPTIONS). aot: a .pt2 file of
    the UNet compiled ahead of time, made at the first call where there is none (sd.optimise.aot). cuda_graph: `unet`
    records each UNet call, `loop` the whole sampling loop.

    original_steps: the first code's sampling loop with its host synchronisations, for a baseline (sd.sampling.original_loop).

    Approximate, so never part of a preset; see sd.optimise.approximate. token_merging: part of the tokens merged before
    self-attention, in [0, 0.75]. feature_caching: the deep part of the UNet runs at every so many calls. quantisation:
    `int8` or `fp8`, dynamic, of the linear layers.
    """

    attention: str = DEFAULT_ATTENTION
    sdpa_kernels: tuple[str, ...] = SDPA_KERNELS
    attention_precision: str = ATTENTION_PRECISIONS[0]
    precision: str = "full"
    compile: str = "none"
    compile_scope: str = "unet"
    compile_autoencoder: str = "none"
    compile_text_encoder: str = "none"
    compile_backend: str = "inductor"
    inductor: tuple[str, ...] = ()
    aot: str | None = None
    cuda_graph: str = "none"
    channels_last: bool = False
    fused_qkv: bool = False
    fused_kv: bool = False
    cache_context_kv: bool = False
    cache_time_embeddings: bool = False
    triton_group_norm: bool = False
    triton_geglu: bool = False
    tf32: bool = False
    original_steps: bool = False
    token_merging: float = 0.0
    feature_caching: int = 1
    quantisation: str = "none"

    def __post_init__(self) -> None:
        for name, choices in (
            ("precision", PRECISIONS),
            ("compile", COMPILE_MODES),
            ("compile_scope", COMPILE_SCOPES),
            ("compile_autoencoder", COMPILE_MODES),
            ("compile_text_encoder", COMPILE_MODES),
            ("compile_backend", COMPILE_BACKENDS),
            ("cuda_graph", CUDA_GRAPHS),
            ("quantisation", QUANTISATIONS),
        ):
            if getattr(self, name) not in choices:
                label = "compile mode" if name == "compile" else name
                raise ConfigError(f"{label} {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if not 0.0 <= self.token_merging <= MAX_RATIO:
            raise ConfigError(f"token_merging {self.token_merging}: must be in [0, {MAX_RATIO}]")
        if self.feature_caching < 1:
            raise ConfigError(f"feature_caching {self.feature_caching}: must be at least 1, which caches nothing")
        self.attention_choice()  # validates its three fields
        self.compilers()
        for reason in self._contradictions():
            raise ConfigError(reason)

    def _contradictions(self) -> Iterator[str]:
        """Why fields cannot go together, each with what to change."""
        modes = {name: getattr(self, name) for name in ("compile", "compile_autoencoder", "compile_text_encoder")}
        if self.inductor and set(modes.values()) == {"none"}:
            yield f"inductor {list(self.inductor)}: nothing is compiled; choose a compile mode"
        if self.attention == "mha":
            for name in ("fused_qkv", "fused_kv", "cache_context_kv"):
                if getattr(self, name):
                    yield f"{name}: nn.MultiheadAttention projects by itself; choose another attention than mha"
        if self.cuda_graph != "none":
            if self.compile in GRAPH_MODES:
                yield (
                    f"cuda_graph {self.cuda_graph}: compile mode {self.compile} records CUDA graphs by itself; choose "
                    "max-autotune-no-cudagraphs or default"
                )
            if self.precision == "autocast":
                yield f"cuda_graph {self.cuda_graph}: autocast frees its cast weights; choose precision fp16 or bf16"
        if self._step_is_compiled and self.cuda_graph == "unet":
            yield "cuda_graph unet: with compile_scope step there are no calls of the UNet; choose cuda_graph loop"
        if self.original_steps:
            for name in ("cache_context_kv", "cache_time_embeddings"):
                if getattr(self, name):
                    yield f"{name}: original_steps is to recompute it at every step; choose one of the two"
            if self._step_is_compiled or self.cuda_graph != "none":
                yield "original_steps: its host synchronisations cannot be part of a graph; compile the UNet alone"
        if self.triton_group_norm and not self.channels_last:
            yield "triton_group_norm: is for images in NHWC; add channels_last"
        if self.aot is not None:
            if self.compile != "none":
                yield "aot: is the UNet compiled already; leave out compile"
            if self.triton_group_norm or self.triton_geglu:
                yield "aot: with triton_group_norm or triton_geglu is not offered; leave those out"
            if self.precision == "autocast" or self.feature_caching > 1 or self.quantisation != "none":
                yield "aot: of a UNet with autocast, feature_caching or quantisation is not offered"
        if self.quantisation != "none" and (self.fused_qkv or self.fused_kv or self.attention == "mha"):
            yield f"quantisation {self.quantisation}: is of separate projections; leave out fused_qkv, fused_kv and mha"
        if self.feature_caching > 1 and (self._step_is_compiled or self.cuda_graph == "loop" or self.original_steps):
            yield (
                "feature_caching: needs a UNet that is called step by step; compile it with scope unet or blocks, graph it "
                "with cuda_graph unet, and leave out original_steps"
            )

    @property
    def _step_is_compiled(self) -> bool:
        return self.compile != "none" and self.compile_scope == "step"

    @classmethod
    def none(cls) -> Optimisations:
        """The plain code."""
        return cls()

    @classmethod
    def original(cls) -> Optimisations:
        """What the published experiment measured speed-ups against; sd.sampling.original_loop says what of it is reproduced."""
        return cls(attention="original", precision="autocast", original_steps=True)

    @classmethod
    def fast(cls, device: torch.device | str = "cpu") -> Optimisations:
        """The exact techniques for steady speed on `device` (compilation takes its minutes at the first picture).

        What this torch or device lacks is left out.
        """
        device = torch.device(device)
        caches: dict[str, Any] = {"cache_context_kv": True, "cache_time_embeddings": True, "fused_qkv": True}
        if device.type != "cuda":
            compiles = has("compile") and cpp_compiler() is not None
            # Without inductor's fusions, NHWC group norms cost a CPU more than NHWC convolutions save.
            return cls(compile="default" if compiles else "none", channels_last=compiles, **caches)
        mode = "max-autotune-no-cudagraphs" if has("compile") else "none"
        return cls(
            precision="bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16",
            tf32=True,
            compile=mode,
            compile_autoencoder=mode,
            compile_text_encoder=mode,
            cuda_graph="unet",
            channels_last=True,
            **caches,
        )

    def attention_choice(self) -> Attention:
        """The three attention fields as sd.attention.functions takes them."""
        return Attention(self.attention, tuple(self.sdpa_kernels), self.attention_precision)

    def compilers(self) -> dict[str, Compiler]:
        """How the UNet, the autoencoder and the text encoder are compiled; those that are not are left out."""
        modes = {
            "unet": self.compile,
            "autoencoder": self.compile_autoencoder,
            "text_encoder": self.compile_text_encoder,
        }
        attention = self.attention_choice()
        kernels = attention.kernels if attention.restricted else ()
        return {
            name: Compiler(mode, self.compile_backend, tuple(self.inductor), kernels)
            for name, mode in modes.items()
            if mode != "none"
        }

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context in which the networks run."""
        if self.precision == "autocast":
            return torch.autocast(device.type, dtype=autocast_dtype(device))
        return contextlib.nullcontext()

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """dtype in which attention is computed."""
        return autocast_dtype(device) if self.precision == "autocast" else WEIGHT_DTYPES[self.precision]

    def memory_format(self) -> torch.memory_format:
        """Layout of images and of the weights of convolutions."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def changed(self) -> dict[str, object]:
        """The fields that are not at their defaults."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }


def autocast_dtype(device: torch.device) -> torch.dtype:
    """fp16 on CUDA, as published; bf16 on a CPU, where autocast has nothing else on every torch."""
    return torch.float16 if device.type == "cuda" else torch.bfloat16
