"""Apply optimisations to the three networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sd.attention.availability import check, for_head_dim
from sd.attention.observation import ObservedCall
from sd.errors import ConfigError, Unavailable
from sd.features import require
from sd.optimise.aot import AheadOfTime, check_path
from sd.optimise.approximate import CachedFeatures, merge_tokens, quantise, require_quantisation, require_wide_layers
from sd.optimise.compile import CompiledStep, compile_blocks, require_cpp_compiler, restore
from sd.optimise.cuda_graphs import Graphed, GraphedLoop
from sd.optimise.kernels import require_kernels, use_kernels
from sd.optimise.optimisations import _TF32_DEFAULTS, WEIGHT_DTYPES, Optimisations
from sd.sampling.samplers import run


def require_available(optimisations: Optimisations, device: torch.device) -> None:
    """Raise Unavailable for what this torch or device lacks, as far as it can be known without a model."""
    dtype = WEIGHT_DTYPES[optimisations.precision]
    if dtype == torch.float16 and device.type == "cpu":
        require("cpu_fp16", "precision fp16 on the CPU")
    if dtype == torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise Unavailable("precision bf16: this GPU has no bf16; use fp16 or autocast")
    for compiler in optimisations.compilers().values():
        compiler.require(device)
    if optimisations.compile != "none" and optimisations.compile_scope == "blocks":
        require("recompile_limit", "compile_scope blocks")
    if device.type != "cuda":
        for name, asked in (("tf32", optimisations.tf32), ("cuda_graph", optimisations.cuda_graph != "none")):
            if asked:
                raise Unavailable(f"{name}: needs an NVIDIA GPU, and the device is {device}: leave it out")
    for name in ("triton_group_norm", "triton_geglu"):
        if getattr(optimisations, name):
            require_kernels(name, device)
    require_quantisation(optimisations.quantisation, device)
    if optimisations.aot is not None:
        check_path(optimisations.aot)
        if device.type == "cpu":
            require_cpp_compiler("aot")


@dataclass(frozen=True)
class Calls:
    """What a picture is made with: the networks as they are to be called, and the sampling loop.

    unet, decode: as UNet.forward and Autoencoder.decode. sample: as sd.sampling.samplers.run.
    """

    unet: Callable[..., torch.Tensor]
    decode: ObservedCall
    sample: Callable[..., torch.Tensor]
    observed_unet: ObservedCall
    feature_caching: int

    def unet_of_run(self) -> Callable[..., torch.Tensor]:
        """The UNet for one run of a sampler: with feature caching it remembers from call to call."""
        return self.unet if self.feature_caching == 1 else CachedFeatures(self.unet, self.feature_caching)

    @property
    def kernels(self) -> dict[str, tuple[str, ...]]:
        """The attention kernels that really ran, by network; empty tuples until the first picture was made."""
        return {"unet": self.observed_unet.kernels, "autoencoder": self.decode.kernels}


def apply(unet: Any, autoencoder: Any, text_encoder: Any, device: torch.device, optimisations: Optimisations) -> Calls:
    """Make loaded networks run as `optimisations` says; may be called again with another choice.

    Raises Unavailable, before anything is changed, when a part of it cannot run here, and ConfigError when weights
    would have to gain precision that they have lost.
    """
    dtype = WEIGHT_DTYPES[optimisations.precision]
    if unet.dtype != dtype and unet.dtype in (torch.float16, torch.bfloat16):
        raise ConfigError(
            f"precision {optimisations.precision}: the weights were already rounded to {unet.dtype}; load the checkpoint again"
        )
    if unet.quantisation not in ("none", optimisations.quantisation):
        raise ConfigError(
            f"quantisation {optimisations.quantisation}: the weights were already rounded to {unet.quantisation}; load "
            "the checkpoint again"
        )
    require_available(optimisations, device)
    if unet.quantisation == "none":
        require_wide_layers(unet, optimisations.quantisation)
    compute_dtype = optimisations.compute_dtype(device)
    attention = optimisations.attention_choice()
    check(attention, device, compute_dtype, unet.head_dims())

    restore(unet, autoencoder, text_encoder)
    unet.fuse_projections(False, False)
    for network in (unet, autoencoder, text_encoder):
        network.to(device=device, dtype=dtype, memory_format=optimisations.memory_format())
    unet.use_attention(attention)
    autoencoder.use_attention(for_head_dim(attention, device, compute_dtype, autoencoder.head_dim()))
    unet.fuse_projections(optimisations.fused_qkv, optimisations.fused_kv)
    quantise(unet, optimisations.quantisation)
    unet.frequencies_device = torch.device("cpu") if optimisations.original_steps else None
    merge_tokens(unet, optimisations.token_merging)
    use_kernels((unet, autoencoder), optimisations.triton_group_norm, optimisations.triton_geglu)
    for network in (unet, autoencoder, text_encoder):
        # Autocast keeps the casts of weights only where a gradient could be asked for; all runs are without.
        for weight in (*network.parameters(), *network.buffers()):
            weight.requires_grad_(optimisations.precision == "autocast")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = optimisations.tf32 or _TF32_DEFAULTS["matmul"]
        torch.backends.cudnn.allow_tf32 = optimisations.tf32 or _TF32_DEFAULTS["cudnn"]
    return _calls(unet, autoencoder, text_encoder, optimisations)


def _calls(unet: Any, autoencoder: Any, text_encoder: Any, optimisations: Optimisations) -> Calls:
    compilers = optimisations.compilers()
    if "autoencoder" in compilers:
        autoencoder.to_pixels = compilers["autoencoder"].keepable(autoencoder.to_pixels)
    if "text_encoder" in compilers:
        text_encoder.forward = compilers["text_encoder"].keepable(text_encoder.forward)

    name = "denoise" if optimisations.feature_caching == 1 else "denoise_with_features"
    if "unet" in compilers and optimisations.compile_scope == "unet":
        setattr(unet, name, compilers["unet"].keepable(getattr(unet, name)))
    elif "unet" in compilers and optimisations.compile_scope == "blocks":
        compile_blocks(unet, compilers["unet"])
    elif optimisations.aot is not None:
        choice = " ".join(f"{key}={value}" for key, value in optimisations.changed().items() if key != "aot")
        unet.denoise = AheadOfTime(unet, Path(optimisations.aot), choice)

    observed = ObservedCall(unet if optimisations.feature_caching == 1 else unet.forward_with_features)
    call: Any = observed
    loop: Any = run
    if "unet" in compilers and optimisations.compile_scope == "step":
        call, loop = unet, CompiledStep(unet, compilers["unet"], optimisations.attention_choice())
        observed = loop.call
    if optimisations.cuda_graph == "unet":
        call = Graphed(observed)
    elif optimisations.cuda_graph == "loop":
        loop = GraphedLoop(loop)
    decode = ObservedCall(autoencoder.decode, observe_call=1)
    return Calls(call, decode, loop, observed, optimisations.feature_caching)
