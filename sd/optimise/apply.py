"""Application of optimisations to the networks, and the context in which these run."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sd.attention.availability import check, for_head_dim
from sd.attention.modules import ProjectedContext
from sd.attention.observation import ObservedCall
from sd.errors import ConfigError, SDWarning, Unavailable
from sd.features import computes_slowly, has, require
from sd.kernels import OWN_ATTENTION, avx2
from sd.models.autoencoder import Autoencoder
from sd.models.text_encoder import TextEncoder
from sd.models.unet import UNet
from sd.optimise import avx2_layers
from sd.optimise.approximate import CachedFeatures, merge_tokens, quantise, require_quantisation, require_wide_layers
from sd.optimise.compile import (
    CompiledStep,
    compile_blocks,
    prepare_cpp_compiler,
    restore,
    separate_biases,
    use_nhwc,
)
from sd.optimise.cuda_graphs import Graphed, GraphedLoop, addresses_of
from sd.optimise.guards import GuardedOnce
from sd.optimise.optimisations import WEIGHT_DTYPES, Optimisations
from sd.optimise.packed import cache_code, pack, unpack
from sd.sampling.plan import run

# TF32, cuDNN's benchmark mode and the SDPA kernel choice are settings of the process: one model runs at a time.
_PROCESS_SETTINGS = threading.RLock()


@contextmanager
def float32_precision(tf32: bool) -> Iterator[None]:
    """Let fp32 matrix products and convolutions use TF32, or neither; the former settings of the process return on exit."""
    backends: Any = torch.backends
    cudnn = backends.cudnn
    # Settings of torch 2.9; torch cannot read the older ones, below, once the caller has changed these.
    owners = [backends.cuda.matmul, backends.mkldnn.matmul, cudnn.conv, cudnn.rnn] if has("fp32_precision") else []
    with _PROCESS_SETTINGS, ExitStack() as restored:
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


@contextmanager
def cudnn_benchmark(enabled: bool) -> Iterator[None]:
    """Let cuDNN measure its algorithms at the first convolution of each shape, or choose by rules; restored on exit."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark
    cudnn.benchmark = enabled
    try:
        yield
    finally:
        cudnn.benchmark = before


def require_available(optimisations: Optimisations, device: torch.device) -> None:
    """Raise Unavailable for features that this torch or device lacks, as far as that can be decided without a model."""
    dtype = WEIGHT_DTYPES[optimisations.precision]
    if dtype == torch.float16 and device.type == "cpu":
        require("cpu_fp16", "precision fp16 on the CPU")
    if device.type == "cpu" and computes_slowly(dtype):
        slow = f"precision {optimisations.precision}: this processor emulates it, many times slower than fp32"
        warnings.warn(f"{slow}; choose another precision", SDWarning, stacklevel=1)  # of one place, so shown once
    if dtype == torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise Unavailable("precision bf16: this GPU has no bf16; use fp16 or autocast")
    for compiler in optimisations.compilers().values():
        compiler.require(device)
    if device.type != "cuda":
        for name, choice in (
            ("tf32", optimisations.tf32),
            ("cudnn_benchmark", optimisations.cudnn_benchmark),
            ("cuda_graph", optimisations.cuda_graph != "none"),
        ):
            if choice:
                raise Unavailable(f"{name}: needs an NVIDIA GPU, and the device is {device}: leave it out")
    if optimisations.packed:
        if device.type != "cpu":
            raise Unavailable(f"packed: is a layout of a CPU's weights, and the device is {device}: leave it out")
        require("packed", "packed")
        if computes_slowly(dtype):
            name = optimisations.precision
            raise Unavailable(
                f"packed: this processor has no instructions for {name}, as packed needs: leave one of the two out"
            )
    kernels = {f"{name}_attention": module.unavailable_reason for name, module in OWN_ATTENTION.items()}
    kernels.update(avx2_layers=avx2.unavailable_reason, avx512_layers=avx2.bf16_unavailable_reason)
    for name, unavailable_reason in kernels.items():
        reason = unavailable_reason(device) if getattr(optimisations, name) else None
        if reason:
            raise Unavailable(f"{name}: {reason}: leave it out")
    require_quantisation(optimisations.quantisation, device)


@dataclass(frozen=True)
class Calls:
    """The entry points of optimised networks; call them in `context`, and without gradients.

    encode, unet, decode: as TextEncoder.forward, UNet.forward and Autoencoder.decode. project_context, time_table: as those
    of the UNet. sample: as sd.sampling.plan.run. guarded: the UNet's compiled method, if it has one.
    """

    encode: Callable[[Tensor], Tensor]
    project_context: Callable[[Tensor], ProjectedContext]
    time_table: Callable[[Tensor, float | None], Tensor]
    unet: Callable[..., Any]
    sample: Callable[..., Tensor]
    decode: Callable[[Tensor], Tensor]
    guarded: GuardedOnce | None
    observed_unet: ObservedCall
    observed_decoder: ObservedCall
    optimisations: Optimisations
    device: torch.device

    @contextmanager
    def context(self) -> Iterator[None]:
        """Autocast, TF32 and cuDNN's benchmark mode as chosen; no other model of the process runs meanwhile.

        The settings are restored on exit.

        Re-entrant within a thread. Other threads wait, so a progress callback must not wait for another thread's model.
        """
        chosen = self.optimisations
        with (
            _PROCESS_SETTINGS,
            torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext(),
            float32_precision(chosen.tf32),
            cudnn_benchmark(chosen.cudnn_benchmark),
            chosen.autocast(self.device),
        ):
            yield

    def unet_of_run(self) -> Callable[..., Tensor]:
        """The UNet for one sampler run; with feature caching it has state."""
        graphs = [each for each in (self.unet, self.project_context, self.time_table) if isinstance(each, Graphed)]
        if graphs:  # all of the UNet's weights, which are compared once a run
            addresses = addresses_of(*graphs[0].networks)
            for graph in graphs:
                graph.begin_run(addresses)
        unet = self.unet
        if self.guarded is not None and self.optimisations.cuda_graph == "none":  # a recorded graph evaluates none
            unet = self.guarded.of_run(unet)
        interval = self.optimisations.feature_caching
        return unet if interval == 1 else CachedFeatures(unet, interval)

    @property
    def kernels(self) -> dict[str, tuple[str, ...]]:
        """The attention kernels that ran, by network; empty tuples before the first image, or the second where compiled."""
        return {"unet": self.observed_unet.kernels, "autoencoder": self.observed_decoder.kernels}


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
    # Of all weights: a conversion may have been interrupted.
    dtypes = {weight.dtype for network in (unet, autoencoder, text_encoder) for weight in network.parameters()}
    rounded = (dtypes & {torch.float16, torch.bfloat16}) - {dtype}
    if rounded:
        names = ", ".join(sorted(map(str, rounded)))
        raise ConfigError(
            f"precision {optimisations.precision}: the weights were already rounded to {names}; load the checkpoint again"
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
    unpack(unet)
    unpack(autoencoder)
    unet.fuse_projections(False, False)
    unet.fold_projections(False)
    for network in (unet, autoencoder, text_encoder):
        network.to(device, dtype).to(memory_format=optimisations.memory_format())
    unet.use_attention(attention)
    autoencoder.use_attention(decoder_attention)
    unet.fuse_projections(optimisations.fused_qkv, optimisations.fused_kv)
    unet.fold_projections(optimisations.folded_projections)
    quantise(unet, optimisations.quantisation)
    unet.frequencies_device = torch.device("cpu") if optimisations.original_steps else None
    merge_tokens(unet, optimisations.token_merging)
    for network in (unet, autoencoder, text_encoder):
        # Autocast caches the casts of weights that require a gradient, and no others; every run is under no_grad.
        for weight in (*network.parameters(), *network.buffers()):
            weight.requires_grad_(optimisations.precision == "autocast")
    pack_weights((unet, autoencoder), optimisations)
    return _calls(unet, autoencoder, text_encoder, device, optimisations)


def pack_weights(networks: Iterable[nn.Module], optimisations: Optimisations) -> None:
    """Pack the weights of the layers as chosen; `sd.optimise.packed.unpack` undoes it."""
    for network in networks:
        if optimisations.avx2_layers or optimisations.avx512_layers:
            avx2_layers.pack(network)
        if optimisations.packed:
            pack(network)


def _calls(
    unet: UNet,
    autoencoder: Autoencoder,
    text_encoder: TextEncoder,
    device: torch.device,
    optimisations: Optimisations,
) -> Calls:
    compilers = optimisations.compilers()
    separate_biases(unet, optimisations.separate_bias)
    use_nhwc(unet, optimisations.nhwc_norms and "unet" in compilers)
    use_nhwc(autoencoder.decoder, optimisations.nhwc_norms and "autoencoder" in compilers)
    if "autoencoder" in compilers:
        vars(autoencoder)["to_pixels"] = compilers["autoencoder"].with_cloned_outputs(autoencoder.to_pixels)
    if "text_encoder" in compilers:
        vars(text_encoder)["forward"] = compilers["text_encoder"].with_cloned_outputs(text_encoder.forward)

    caches_features = optimisations.feature_caching > 1
    guarded = None
    if "unet" in compilers and optimisations.compile_scope == "unet":
        name = "denoise_with_features" if caches_features else "denoise"
        method = getattr(unet, name)
        guarded = GuardedOnce(method, compilers["unet"](method), unet)
        vars(unet)[name] = compilers["unet"].cloning(guarded)
    elif "unet" in compilers and optimisations.compile_scope == "blocks":
        compile_blocks(unet, compilers["unet"])

    observed = ObservedCall(unet.forward_with_features if caches_features else unet)
    call: Callable[..., Any] = observed
    loop: Callable[..., Tensor] = run
    if "unet" in compilers and optimisations.compile_scope == "step":
        call = unet
        loop = step = CompiledStep(unet, compilers["unet"], optimisations.attention_choice())
        observed = step.call
    if optimisations.cuda_graph in ("unet", "networks"):
        call = Graphed(observed, unet, every_call=False)
    elif optimisations.cuda_graph == "loop":
        loop = GraphedLoop(unet, loop)
    # A compiled decoder's first call is tracing and autotuning, which the profiler would record.
    decoder = ObservedCall(autoencoder.decode, observe_call=2 if "autoencoder" in compilers else 1)
    encode: Callable[..., Any] = text_encoder
    project: Callable[..., Any] = unet.project_context
    tabulate: Callable[..., Any] = unet.time_table
    decode: Callable[..., Any] = decoder
    if optimisations.cuda_graph == "networks":
        encode, project = Graphed(text_encoder, text_encoder), Graphed(unet.project_context, unet, every_call=False)
        decode = Graphed(decoder, autoencoder)
        if not unet.embeds_guidance:  # whose scale is a number
            tabulate = Graphed(unet.time_table, unet, every_call=False)
    if compilers and optimisations.compile_backend == "inductor" and device.type == "cpu":
        prepare_cpp_compiler()
        if optimisations.packed:
            cache_code()
    return Calls(
        encode=encode,
        project_context=project,
        time_table=tabulate,
        unet=call,
        sample=loop,
        decode=decode,
        guarded=guarded,
        observed_unet=observed,
        observed_decoder=decoder,
        optimisations=optimisations,
        device=device,
    )
