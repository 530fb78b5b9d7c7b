"""The choice of optimisations: one field for each technique, validated, and the presets `none`, `original` and `fast`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
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
    RUNTIMES,
    SDPA_KERNELS,
    why_no_inductor,
)
from sd.errors import ConfigError
from sd.features import bf16_beats_fp32, has, processor_has
from sd.kernels import OWN_ATTENTION, avx2, avx512
from sd.models.token_merging import MAX_RATIO
from sd.optimise import avx2_layers
from sd.optimise.compile import CUDA_GRAPH_MODES, INDUCTOR_OPTIONS, Compiler, why_no_triton

WEIGHT_DTYPES = {"full": torch.float32, "autocast": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OWN_KERNELS = {  # and their precision
    "avx2_layers": "full",
    "avx2_attention": "full",
    "avx512_layers": "bf16",
    "avx512_attention": "bf16",
}
CHOICES = {
    "precision": PRECISIONS,
    "compile": COMPILE_MODES,
    "compile_scope": COMPILE_SCOPES,
    "compile_autoencoder": COMPILE_MODES,
    "compile_text_encoder": COMPILE_MODES,
    "compile_backend": COMPILE_BACKENDS,
    "cuda_graph": CUDA_GRAPHS,
    "quantisation": QUANTISATIONS,
}


def can_compile_ahead(fields: Mapping[str, Any]) -> bool:
    """Whether backend `aotinductor` compiles with these fields of Optimisations: whole networks whose weights are plain tensors."""
    modes = {fields[name] for name in ("compile", "compile_autoencoder", "compile_text_encoder")} - {"none"}
    excluded = fields["packed"] or fields["inductor"] or fields["whole_norms"]
    excluded = excluded or fields["quantisation"] != "none" or fields["precision"] == "autocast"
    return modes == {"default"} and fields["compile_scope"] == "unet" and not excluded


@dataclass(frozen=True)
class Optimisations:
    """How a model is run. Raises ConfigError for unknown or contradictory values; sd.optimise.apply raises Unavailable.

    attention: `original`, `xformers`, `mha` or `sdpa`. sdpa_kernels: kernels allowed in `mha` and `sdpa`.
    attention_precision: `fp32` upcasts q and k in `original`, `input` does not. precision: `full` (fp32), `autocast`
    (fp32 weights; fp16 on CUDA, bf16 on a CPU), `fp16` and `bf16` (half weights). tf32: fp32 matrix products and
    convolutions on a GPU round their inputs to TF32; without it both are IEEE fp32.

    avx2_attention, avx512_attention: on a CPU, a kernel of sd.kernels in fp32 or bf16 instead of those of `sdpa`.
    avx2_layers: on a CPU in fp32, convolutions, linear layers and group norms by kernels of sd.kernels.avx2; these layers are
    not fused. avx512_layers: the same in bf16 for 3x3 convolutions, narrow layers and norms; other layers can be `packed`.

    channels_last: NHWC weights and activations in all convolutions. fused_qkv, fused_kv: one matrix product for q, k, v of
    self-attention; for k, v of cross-attention. cache_context_kv: compute keys and values of the prompt once per prompt.
    cache_time_embeddings: compute time embeddings and their projections for all timesteps once per run.
    shared_guidance: run the layers before the first attention to the prompt once for both halves of guidance.
    folded_projections: one product for the last feed-forward layer of a transformer and the projection to the image after it.
    packed: weights in oneDNN's layout on a CPU, from sd.optimise.packed.SMALLEST_PACKED channels; these are not fused.
    cudnn_benchmark: cuDNN measures its convolution algorithms at the first call of each shape.
    whole_norms: compiled for a GPU, most group norms compute their statistics in one kernel.
    nhwc_norms: group norms and concatenations of the compiled UNet and decoder in NHWC order (sd.models.layers.GroupNorm), so
    that compiled code transposes none.
    separate_bias: compiled, biases before residuals and norms are added by the next kernel (sd.optimise.compile.separate_biases).

    compile: mode of torch.compile for compile_scope: `unet` (one graph), `blocks` (each ResBlock and transformer block) or
    `step` (UNet, guidance and sampler update in one graph). compile_autoencoder (the decoder), compile_text_encoder: their
    modes. compile_backend: `inductor`, called through Dynamo; `aotinductor`, the same code in packages (sd.optimise.aot);
    `openvino` and `onnxrt`, which run the networks on a CPU (sd.optimise.runtimes); `tensorrt` and `cudagraphs` of a GPU; or
    `aot_eager` and `eager` for debugging. inductor: names of sd.optimise.compile.INDUCTOR_OPTIONS. cuda_graph: `unet` records
    each UNet call, `networks` also the text encoder, the projections before the first step and the decoder, `loop` the whole
    sampling loop.

    original_steps: the published sampling loop with its host synchronisations, a baseline (sd.sampling.original_loop).

    Approximate, in no preset (sd.optimise.approximate): token_merging, the fraction of tokens merged before
    self-attention, in [0, 0.75]; feature_caching, the interval in UNet calls at which its deep part runs; quantisation,
    dynamic `int8` or `fp8` of the linear layers.
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
    cuda_graph: str = "none"
    channels_last: bool = False
    fused_qkv: bool = False
    fused_kv: bool = False
    cache_context_kv: bool = False
    cache_time_embeddings: bool = False
    shared_guidance: bool = False
    folded_projections: bool = False
    packed: bool = False
    avx2_layers: bool = False
    avx2_attention: bool = False
    avx512_layers: bool = False
    avx512_attention: bool = False
    tf32: bool = False
    cudnn_benchmark: bool = False
    whole_norms: bool = False
    nhwc_norms: bool = False
    separate_bias: bool = False
    original_steps: bool = False
    token_merging: float = 0.0
    feature_caching: int = 1
    quantisation: str = "none"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                label = "compile mode" if name == "compile" else name
                raise ConfigError(f"{label} {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        unknown = [name for name in self.inductor if name not in INDUCTOR_OPTIONS]
        if unknown:
            raise ConfigError(f"inductor options {unknown}: choose from {', '.join(INDUCTOR_OPTIONS)}")
        if not 0.0 <= self.token_merging <= MAX_RATIO:
            raise ConfigError(f"token_merging {self.token_merging}: must be in [0, {MAX_RATIO}]")
        if self.feature_caching < 1:
            raise ConfigError(f"feature_caching {self.feature_caching}: must be at least 1, which caches nothing")
        self.attention_choice()  # validates its fields
        for contradiction in self._contradictions():
            raise ConfigError(contradiction)

    def _contradictions(self) -> Iterator[str]:
        """The fields that exclude each other, and the remedy."""
        graph = f"cuda_graph {self.cuda_graph}"
        quantised = self.quantisation != "none"
        if self.inductor and self.compile_backend != "inductor":
            yield f"inductor options {list(self.inductor)}: compile backend {self.compile_backend} has none"
        backend = f"compile backend {self.compile_backend}"
        if self.compile_backend != "inductor" and not self.compilers():
            yield f"{backend}: nothing is compiled; choose a compile mode"
        if self.compile_backend != "inductor" and any(x.mode != "default" for x in self.compilers().values()):
            yield f"{backend}: the other modes are those of inductor; choose compile mode default"
        if self.compile_backend == "aotinductor" and not can_compile_ahead(vars(self)):
            yield (
                f"{backend}: compiles whole networks with plain weights in mode default; choose compile_scope unet, and leave out "
                "packed, quantisation, autocast and inductor options, or choose backend inductor"
            )
        if self.compile_backend in RUNTIMES:
            if self.compile_scope != "unet" or self.compile_text_encoder != "none":
                yield f"{backend}: runs the UNet and the decoder; choose compile_scope unet and no compile_text_encoder"
            excluded = {
                "packed": self.packed,
                **{name: getattr(self, name) for name in OWN_KERNELS},
                "quantisation": quantised,
                "feature_caching": self.feature_caching > 1,
            }
            for name in filter(excluded.get, excluded):
                yield f"{backend}: with {name} is not offered; leave it out"
            if self.precision == "autocast":
                precisions = "full" if self.compile_backend == "onnxrt" else "full or bf16"
                yield f"{backend}: with autocast is not offered; choose precision {precisions}"
            if self.compile_backend == "openvino" and self.precision == "fp16":
                yield f"{backend}: computes fp16 in fp32 on a CPU; choose precision full or bf16"
            if self.compile_backend == "onnxrt" and self.precision != "full":
                yield f"{backend}: has no convolutions in half precision on a CPU; choose precision full"
        if self.inductor and not self.compilers():
            yield f"inductor {list(self.inductor)}: nothing is compiled; choose a compile mode"
        autotuned = any(compiler.mode.startswith("max-autotune") for compiler in self.compilers().values())
        if "persistent_tma_matmul" in self.inductor and not autotuned:
            yield "persistent_tma_matmul: changes kernels of max-autotune alone; choose a compile mode of that"
        if self.whole_norms and (not self.compilers() or self.compile_backend != "inductor"):
            yield "whole_norms: nothing is compiled by inductor; choose a compile mode"
        if self.nhwc_norms and not self.channels_last:
            yield "nhwc_norms: images are NCHW; choose channels_last too"
        for name in self._chosen("nhwc_norms", "separate_bias"):
            if not self.compilers() or self.compile_backend in RUNTIMES:
                yield f"{name}: nothing is compiled by torch.compile; choose a compile mode"
            if self.compile != "none" and self.compile_scope == "blocks":
                yield f"{name}: also changes layers between the blocks, which are not compiled; choose compile_scope unet or step"
        if self.separate_bias and self.compile == "none":
            yield "separate_bias: changes the UNet, which is not compiled; choose a compile mode"
        if self.attention == "mha":
            for name in self._chosen("fused_qkv", "fused_kv", "cache_context_kv"):
                yield f"{name}: nn.MultiheadAttention has its own projections; choose another attention than mha"
        recorded = {"compile mode": self.compile} if self.cuda_graph != "none" else {}
        if self.cuda_graph == "networks":
            recorded.update(
                compile_autoencoder=self.compile_autoencoder, compile_text_encoder=self.compile_text_encoder
            )
        for field, mode in recorded.items():
            if mode in CUDA_GRAPH_MODES:
                yield (
                    f"{graph}: {field} {mode} records CUDA graphs by itself; choose max-autotune-no-cudagraphs or default"
                )
        if self.cuda_graph != "none" and self.compile_backend == "cudagraphs":
            yield f"{graph}: {backend} records CUDA graphs by itself; choose one of the two"
        if self.cuda_graph != "none" and self.precision == "autocast":
            yield f"{graph}: autocast frees its cast weights; choose precision fp16 or bf16"
        if self.cuda_graph in ("unet", "networks") and self._compiles_step:
            yield f"{graph}: compile_scope step has no separate UNet call; choose cuda_graph loop"
        if self.packed and self.avx2_layers:
            yield "packed: avx2_layers packs the same weights for its kernel; choose one of the two"
        for name in self._chosen("packed", "avx2_layers", "avx512_layers"):
            if not self.channels_last:
                yield f"{name}: convolutions would copy NCHW images; choose channels_last too"
            if self.separate_bias:
                yield f"separate_bias: with {name}, which adds the bias for nothing, is not offered; choose one of the two"
            quantises = quantised and name != "avx512_layers"  # which leaves quantised layers as they are
            if self.precision == "autocast" or quantises or "freezing" in self.inductor:
                yield f"{name}: with autocast, quantisation or freezing, which have weights of their own, is not offered"
        if self.folded_projections:
            for name in self._chosen("packed", "avx2_layers", "avx512_layers"):
                yield f"folded_projections: with {name}, which computes separate layers, is not offered; choose one of the two"
            if quantised or (self.compile != "none" and self.compile_scope == "blocks"):
                yield "folded_projections: quantisation and compile_scope blocks change the separate layers; leave one out"
        for name in self._chosen(*OWN_KERNELS):
            precision = OWN_KERNELS[name]
            if self.precision != precision:
                wanted = f"choose {precision}, or leave it out"
                yield f"{name}: computes in precision {precision}, and precision is {self.precision}; {wanted}"
        if self.original_steps:
            for name in self._chosen("cache_context_kv", "cache_time_embeddings", "shared_guidance"):
                yield f"{name}: original_steps recomputes it at every step; choose one of the two"
            if self._compiles_step or self.cuda_graph != "none":
                yield "original_steps: a graph cannot contain its host synchronisations; compile the UNet alone"
        if quantised and (self.fused_qkv or self.fused_kv or self.attention == "mha"):
            yield f"quantisation {self.quantisation}: needs separate projections; leave out fused_qkv, fused_kv and mha"
        if self.feature_caching > 1 and (self._compiles_step or self.cuda_graph == "loop" or self.original_steps):
            yield (
                "feature_caching: needs separate UNet calls; use compile_scope unet or blocks, cuda_graph unet or networks, and "
                "leave out original_steps"
            )

    def _chosen(self, *names: str) -> list[str]:
        return [name for name in names if getattr(self, name)]

    @property
    def _compiles_step(self) -> bool:
        return self.compile != "none" and self.compile_scope == "step"

    @classmethod
    def none(cls) -> Optimisations:
        """No optimisation."""
        return cls()

    @classmethod
    def original(cls) -> Optimisations:
        """The baseline of the published speed-ups; sd.sampling.original_loop lists what it reproduces."""
        return cls(attention="original", precision="autocast", original_steps=True)

    @classmethod
    def fast(cls, device: torch.device | str = "cpu", narrow: bool = False) -> Optimisations:
        """The exact techniques for throughput on `device`, without those that this torch or device lacks.

        narrow: keep fp32 on a CPU, as for the embedded models: conversions cost their narrow layers more than bf16 saves.
        The first image includes the compilation, of up to minutes.
        """
        device = torch.device(device)
        names = ("cache_context_kv", "cache_time_embeddings", "fused_qkv", "shared_guidance")
        caches: dict[str, Any] = dict.fromkeys(names, True)
        if device.type != "cuda":
            compiles = has("compile") and why_no_inductor() is None
            # Without inductor's fusions, NHWC group norms cost a CPU more than NHWC convolutions save.
            packed = compiles and has("packed")
            bf16 = packed and not narrow and bf16_beats_fp32()
            own = compiles and not bf16 and avx2.run_here()
            if packed and own and processor_has("avx512"):  # which oneDNN uses
                own = avx2_layers.beat_packed()
            return cls(
                precision="bf16" if bf16 else "full",
                avx512_layers=bf16 and avx2.run_here("avx512_bf16") and avx2_layers.beat_packed(torch.bfloat16),
                avx512_attention=bf16 and avx512.beats_sdpa(),
                avx2_layers=own,
                avx2_attention=own,
                compile="default" if compiles else "none",
                compile_backend="aotinductor" if own and has("aot") else "inductor",
                channels_last=compiles,
                packed=packed and not own,
                **caches,
            )
        # On the host of an H200 max-autotune had not ended after 250 s; default ended after 76 to 99 s (docs/your-gpu.md).
        compiles = has("compile") and why_no_triton(device) is None
        compiled = "default" if compiles else "none"
        return cls(
            precision="fp16",  # ten bits of mantissa against bf16's seven, at the same rate
            tf32=True,
            whole_norms=compiles and has("reduction_choices"),
            nhwc_norms=compiles,
            separate_bias=compiles,
            folded_projections=compiles,  # eager it would copy both inputs
            compile=compiled,
            compile_autoencoder=compiled,
            compile_text_encoder=compiled,
            cuda_graph="networks",
            channels_last=True,
            **caches,
        )

    def attention_choice(self) -> Attention:
        """The fields of attention as an Attention."""
        own = "".join(name for name in OWN_ATTENTION if getattr(self, f"{name}_attention"))
        return Attention(self.attention, tuple(self.sdpa_kernels), self.attention_precision, own=own)

    def compilers(self) -> dict[str, Compiler]:
        """Compilers by network: `unet`, `autoencoder`, `text_encoder`, without those that are not compiled."""
        modes = {
            "unet": self.compile,
            "autoencoder": self.compile_autoencoder,
            "text_encoder": self.compile_text_encoder,
        }
        attention = self.attention_choice()
        kernels = attention.kernels if attention.restricted else ()
        choice = repr(sorted(self.changed().items()))
        return {
            name: Compiler(mode, self.compile_backend, tuple(self.inductor), kernels, self.whole_norms, choice)
            for name, mode in modes.items()
            if mode != "none"
        }

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Context of autocast on `device`; empty for other precisions."""
        if self.precision == "autocast":
            return torch.autocast(device.type, dtype=self.compute_dtype(device))
        return contextlib.nullcontext()

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """dtype in which attention is computed."""
        if self.precision == "autocast":  # fp16 on CUDA, as published; CPU autocast has only bf16 in every torch
            return torch.float16 if device.type == "cuda" else torch.bfloat16
        return WEIGHT_DTYPES[self.precision]

    def memory_format(self) -> torch.memory_format:
        """Layout of images and of the weights of convolutions."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def changed(self) -> dict[str, object]:
        """The fields that differ from their defaults."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }
