"""Application of optimisations to the networks, and the context in which these run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd.attention.availability import check, for_head_dim
from sd.attention.observation import ObservedCall
from sd.errors import ConfigError, Unavailable
from sd.features import has, require
from sd.models.autoencoder import Autoencoder
from sd.models.layers import GEGLU, GroupNorm
from sd.models.text_encoder import TextEncoder
from sd.models.unet import UNet
from sd.optimise.aot import AheadOfTime, check_package_path
from sd.optimise.approximate import CachedFeatures, merge_tokens, quantise, require_quantisation, require_wide_layers
from sd.optimise.compile import CompiledStep, compile_blocks, require_cpp_compiler, restore
from sd.optimise.cuda_graphs import Graphed, GraphedLoop
from sd.optimise.optimisations import WEIGHT_DTYPES, Optimisations
from sd.sampling.samplers import run

TRITON_CAPABILITY = (8, 0)  # the oldest GPU that the tests compile the Triton kernels for
# TF32 and the SDPA kernel choice are settings of the process, so that only one model may run at a time.
_PROCESS_SETTINGS = threading.RLock()


@contextmanager
def float32_precision(tf32: bool) -> Iterator[None]:
    """Let fp32 matrix products and convolutions use TF32, or neither; the former settings of the process return on exit."""
    backends: Any = torch.backends
    cudnn = backends.cudnn
    # Settings of torch 2.9; torch cannot read the older ones, below, once the caller has changed these.
    owners = [backends.cuda.matmul, backends.mkldnn.matmul, cudnn.conv, cudnn.rnn] if has("fp32_precision") else []
    with ExitStack() as restored:
        for owner in owners:
            restored.callback(setattr, owner, "fp32_precision", owner.fp32_precision)
        try:
            restored.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            restored.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            cudnn.allow_tf32 = tf32
        except RuntimeError:
            for owner in owners:
                owner.fp32_precision = "tf32" if tf32 else "ieee"
        yield


def require_available(optimisations: Optimisations, device: torch.device) -> None:
    """Raise Unavailable for features that this torch or device lacks, as far as that can be decided without a model."""
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
        for name, chosen in (("tf32", optimisations.tf32), ("cuda_graph", optimisations.cuda_graph != "none")):
            if chosen:
                raise Unavailable(f"{name}: needs an NVIDIA GPU, and the device is {device}: leave it out")
    for name in ("triton_group_norm", "triton_geglu"):
        if getattr(optimisations, name):
            require_triton(name, device)
    require_quantisation(optimisations.quantisation, device)
    if optimisations.aot is not None:
        check_package_path(optimisations.aot)
        if device.type == "cpu":
            require_cpp_compiler("aot")


def require_triton(option: str, device: torch.device) -> None:
    """Raise Unavailable, naming the option, if the Triton kernels cannot run.

    They need an NVIDIA GPU of TRITON_CAPABILITY. For tests, TRITON_INTERPRET=1, set before triton is imported, runs them
    on a CPU by Triton's interpreter, about a thousand times slower.
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unavailable(f"{option}: needs an NVIDIA GPU, and the device is {device}: leave it out")
    require("triton_op", option)
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"{option}: needs triton, which comes with torch for NVIDIA GPUs ({error})") from None
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < TRITON_CAPABILITY:
        raise Unavailable(
            f"{option}: needs compute capability {'.'.join(map(str, TRITON_CAPABILITY))}, and {device} has less"
        )


def use_triton_kernels(networks: tuple[nn.Module, ...], group_norm: bool, geglu: bool) -> None:
    """Switch every GroupNorm and GEGLU of the networks to its Triton kernel, or back to the plain code."""
    if group_norm or geglu:
        from sd.optimise import triton_kernels  # imports triton: half a second, and torch before 2.6 has no triton_op
    for network in networks:
        for module in network.modules():
            if isinstance(module, GroupNorm):
                module.kernel = triton_kernels.group_norm if group_norm else None
            elif isinstance(module, GEGLU):
                module.kernel = triton_kernels.geglu if geglu else None


@dataclass(frozen=True)
class Calls:
    """The entry points of optimised networks; call them in `context`.

    unet, decode: as UNet.forward and Autoencoder.decode. sample: as sd.sampling.samplers.run.
    """

    unet: Callable[..., Any]
    decode: ObservedCall
    sample: Callable[..., Tensor]
    observed_unet: ObservedCall
    optimisations: Optimisations
    device: torch.device

    @contextmanager
    def context(self) -> Iterator[None]:
        """Autocast and TF32 as chosen; no other model of the process runs meanwhile, and settings are restored on exit.

        Re-entrant within a thread. Other threads wait, so a progress callback must not wait for another thread's model.
        """
        with _PROCESS_SETTINGS, float32_precision(self.optimisations.tf32), self.optimisations.autocast(self.device):
            yield

    def unet_of_run(self) -> Callable[..., Tensor]:
        """The UNet for one sampler run; with feature caching it has state."""
        interval = self.optimisations.feature_caching
        return self.unet if interval == 1 else CachedFeatures(self.unet, interval)

    @property
    def kernels(self) -> dict[str, tuple[str, ...]]:
        """The attention kernels that ran, by network; empty tuples before the first image."""
        return {"unet": self.observed_unet.kernels, "autoencoder": self.decode.kernels}


def apply(
    unet: UNet,
    autoencoder: Autoencoder,
    text_encoder: TextEncoder,
    device: torch.device,
    optimisations: Optimisations,
) -> Calls:
    """Apply `optimisations` to loaded networks in place; a later call with another choice undoes them.

    Raises, before any change, Unavailable for a feature that this machine lacks and ConfigError if weights were already
    rounded to a lower precision than is chosen.
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
    with _PROCESS_SETTINGS:  # availability is tested by a call under the kernel choice
        check(attention, device, compute_dtype, unet.head_dims())
        decoder_attention = for_head_dim(attention, device, compute_dtype, autoencoder.head_dim())

    restore(unet, autoencoder, text_encoder)
    unet.fuse_projections(False, False)
    for network in (unet, autoencoder, text_encoder):
        network.to(device, dtype).to(memory_format=optimisations.memory_format())
    unet.use_attention(attention)
    autoencoder.use_attention(decoder_attention)
    unet.fuse_projections(optimisations.fused_qkv, optimisations.fused_kv)
    quantise(unet, optimisations.quantisation)
    unet.frequencies_device = torch.device("cpu") if optimisations.original_steps else None
    merge_tokens(unet, optimisations.token_merging)
    use_triton_kernels((unet, autoencoder), optimisations.triton_group_norm, optimisations.triton_geglu)
    for network in (unet, autoencoder, text_encoder):
        # Autocast caches the casts of weights that require a gradient, and no others; every run is under no_grad.
        for weight in (*network.parameters(), *network.buffers()):
            weight.requires_grad_(optimisations.precision == "autocast")
    return _calls(unet, autoencoder, text_encoder, device, optimisations)


def _calls(
    unet: UNet,
    autoencoder: Autoencoder,
    text_encoder: TextEncoder,
    device: torch.device,
    optimisations: Optimisations,
) -> Calls:
    compilers = optimisations.compilers()
    if "autoencoder" in compilers:
        vars(autoencoder)["to_pixels"] = compilers["autoencoder"].with_cloned_outputs(autoencoder.to_pixels)
    if "text_encoder" in compilers:
        vars(text_encoder)["forward"] = compilers["text_encoder"].with_cloned_outputs(text_encoder.forward)

    caches_features = optimisations.feature_caching > 1
    if "unet" in compilers and optimisations.compile_scope == "unet":
        name = "denoise_with_features" if caches_features else "denoise"
        vars(unet)[name] = compilers["unet"].with_cloned_outputs(getattr(unet, name))
    elif "unet" in compilers and optimisations.compile_scope == "blocks":
        compile_blocks(unet, compilers["unet"])
    elif optimisations.aot is not None:
        choice = " ".join(f"{key}={value}" for key, value in optimisations.changed().items() if key != "aot")
        vars(unet)["denoise"] = AheadOfTime(unet, Path(optimisations.aot), choice)

    observed = ObservedCall(unet.forward_with_features if caches_features else unet)
    call: Callable[..., Any] = observed
    loop: Callable[..., Tensor] = run
    if "unet" in compilers and optimisations.compile_scope == "step":
        call = unet
        loop = step = CompiledStep(unet, compilers["unet"], optimisations.attention_choice())
        observed = step.call
    if optimisations.cuda_graph == "unet":
        call = Graphed(observed)
    elif optimisations.cuda_graph == "loop":
        loop = GraphedLoop(loop)
    decode = ObservedCall(autoencoder.decode, observe_call=1)
    return Calls(call, decode, loop, observed, optimisations, device)
