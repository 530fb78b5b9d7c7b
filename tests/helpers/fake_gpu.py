"""An NVIDIA GPU that PyTorch's compiler believes in, on a machine without one: fake CUDA tensors and faked queries.

Inductor generates the same code as on the GPU, since it asks only for properties; nothing is computed or launched. The caches of
torch keep the answers, so use a process of its own. The SDPA kernel is that of `attention_kernel` and not PyTorch's own choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import device_interface
from torch._inductor import config
from torch._inductor.fx_passes import fuse_attention, pad_mm
from torch._inductor.runtime import triton_helpers
from torch._subclasses import fake_tensor

from sd.config.presets import preset
from sd.models.autoencoder import Autoencoder
from sd.models.text_encoder import TextEncoder
from sd.models.unet import UNet
from sd.optimise.apply import apply
from sd.optimise.optimisations import WEIGHT_DTYPES, Optimisations
from sd.sampling.denoiser import Denoiser

CUDA = torch.device("cuda", 0)


@dataclass(frozen=True)
class GPU:
    """The properties that inductor reads. Sources: NVIDIA's tuning guides and data sheets of the two GPUs."""

    name: str
    capability: tuple[int, int]
    processors: int
    shared_bytes: int  # of a block, opt-in
    shared_bytes_of_processor: int
    l2_bytes: int
    memory_bytes: int = 80 << 30

    @property
    def architecture(self) -> int:
        """As in sm_90."""
        return 10 * self.capability[0] + self.capability[1]

    def properties(self) -> SimpleNamespace:
        """As torch.cuda.get_device_properties."""
        return SimpleNamespace(
            name=self.name,
            major=self.capability[0],
            minor=self.capability[1],
            multi_processor_count=self.processors,
            total_memory=self.memory_bytes,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=2048,
            max_threads_per_block=1024,
            warp_size=32,
            shared_memory_per_block=49152,
            shared_memory_per_block_optin=self.shared_bytes,
            shared_memory_per_multiprocessor=self.shared_bytes_of_processor,
            L2_cache_size=self.l2_bytes,
            gcnArchName="",
            uuid="",
            clock_rate=1_755_000,
            is_integrated=0,
            is_multi_gpu_board=0,
        )


GPUS = {
    "sm_90": GPU("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448, 233472, 50 << 20),
    "sm_80": GPU("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912, 167936, 40 << 20),
}


def attention_kernel(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """F.scaled_dot_product_attention by flash, or by mem_efficient for fp32 and heads wider than 256, which flash refuses.

    For fake CUDA tensors PyTorch would choose `math`.
    """
    assert attn_mask is None and not dropout_p and not enable_gqa
    if q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False, 0.0, is_causal, scale=scale)[0]


def _set_active_driver(gpu: GPU) -> None:
    """Give Triton the GPU as its target."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": gpu.shared_bytes,
                "multiprocessor_count": gpu.processors,
                "warpSize": 32,
                "max_num_regs": 65536,
            }
        )

        def get_current_target(self):
            return GPUTarget("cuda", gpu.architecture, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

        def get_device_interface(self):
            return torch.cuda

        def get_active_torch_device(self):
            return CUDA

        def is_active(self):
            return True

    (driver if hasattr(driver, "set_active") else driver.driver).set_active(Driver())


@contextmanager
def fake_gpu(name: str) -> Iterator[None]:
    """Fake CUDA tensors and inductor's code generation for one of GPUS, under no_grad."""
    gpu = GPUS[name]
    properties = gpu.properties()
    stream = SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1, device=CUDA)
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "is_bf16_supported": True,
        "current_stream": stream,
        "synchronize": None,
        "set_device": None,
    }
    of_torch = {
        "get_device_capability": gpu.capability,
        "get_device_name": gpu.name,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "is_current_stream_capturing": False,
        "is_initialized": True,
        "_lazy_init": None,
        "mem_get_info": (gpu.memory_bytes, gpu.memory_bytes),
        "max_memory_allocated": 0,
        "get_arch_list": [name],
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    of_inductor = {
        "get_compute_capability": gpu.architecture,
        "get_raw_stream": 0,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "is_dtype_supported": True,
    }
    interface = device_interface.CudaInterface
    with ExitStack() as stack:

        def replace(owner: Any, attribute: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, attribute, value, create=True))

        def answer(owner: Any, values: dict[str, Any], wrap: Any = lambda function: function) -> None:
            for attribute, value in values.items():
                replace(owner, attribute, wrap(lambda *_, _value=value, **__: _value))

        torch._C._ensureCUDADeviceGuardSet()
        replace(fake_tensor, "init_gpu_context", lambda *_: None)
        answer(torch.cuda, {**answers, **of_torch})
        answer(interface, {**answers, **of_inductor}, staticmethod)
        answer(interface.Worker, {"get_device_properties": properties, "current_device": 0}, staticmethod)
        device_interface.caching_worker_device_properties["cuda"] = [properties]
        # Without cuDNN's answer every convolution would be laid out as NCHW.
        replace(torch._C, "_select_conv_backend", lambda *_, **__: torch._C._ConvBackend.Cudnn)
        replace(F, "scaled_dot_product_attention", attention_kernel)
        # Patterns that are traced on real tensors of the device. None of them occurs in these networks.
        replace(fuse_attention, "_sfdp_init", lambda *_, **__: None)
        replace(pad_mm, "_pad_mm_init", lambda *_, **__: None)
        _set_active_driver(gpu)
        replace(triton_helpers, "set_driver_to_gpu", lambda: None)
        stack.enter_context(config.patch(joint_graph_constant_folding=False, force_disable_caches=True))
        stack.enter_context(fake_tensor.FakeTensorMode())
        stack.enter_context(torch.no_grad())
        yield


def _move(module: nn.Module, *_: Any, memory_format: torch.memory_format | None = None) -> nn.Module:
    """nn.Module.to for fake weights, which have their device and dtype: only the layout changes."""
    if memory_format is not None:
        for owner in module.modules():
            for name, weight in owner._parameters.items():
                if weight is not None and weight.dim() == 4:
                    owner._parameters[name] = nn.Parameter(weight.detach().contiguous(memory_format=memory_format))
    return module


class FakeModel:
    """The three networks of a model on a fake GPU after `apply`."""

    def __init__(self, name: str, optimisations: Optimisations):
        self.optimisations, self.config = optimisations, preset(name)
        torch.set_default_dtype(WEIGHT_DTYPES[optimisations.precision])
        try:
            with CUDA:
                self.unet, self.autoencoder = UNet(self.config.unet), Autoencoder(self.config.autoencoder)
                self.text_encoder = TextEncoder(self.config.text)
        finally:
            torch.set_default_dtype(torch.float32)
        with ExitStack() as stack:
            # These query the absent GPU by real tensors.
            for query in ("check", "require_available"):
                stack.enter_context(mock.patch(f"sd.optimise.apply.{query}", return_value=None))
            stack.enter_context(mock.patch("sd.optimise.apply.for_head_dim", lambda attention, *_: attention))
            stack.enter_context(mock.patch.object(nn.Module, "to", _move))
            self.calls = apply(self.unet, self.autoencoder, self.text_encoder, CUDA, optimisations)

    def latents(self, batch: int):
        """x [batch, 4, h, w] fp32, as the sampling loop has it."""
        side = self.config.image_size // self.config.autoencoder.downsampling
        x = torch.randn(batch, self.config.unet.in_channels, side, side, device=CUDA)
        return x.contiguous(memory_format=self.optimisations.memory_format())

    def tokens(self, batch: int):
        """Tokens [2 * batch, 77] of prompts and negative prompts."""
        return torch.zeros(2 * batch, self.config.text.context_length, dtype=torch.long, device=CUDA)

    def denoiser(self, batch: int, times: list[float]) -> Denoiser:
        """The denoiser with guidance, with the caches of the optimisations for these timesteps."""
        width, dtype = self.config.unet.context_dim, WEIGHT_DTYPES[self.optimisations.precision]
        context = torch.randn(batch, self.config.text.context_length, width, device=CUDA, dtype=dtype)
        prediction = context, context, 7.5, self.config.parameterization, None, self.optimisations.shared_guidance
        denoise = Denoiser(self.unet.denoise, *prediction)
        if self.optimisations.cache_context_kv:
            denoise.context = self.unet.project_context(denoise.context)
        if self.optimisations.cache_time_embeddings:
            denoise.times, denoise.time_table = times, self.unet.time_table(torch.ones(len(times), device=CUDA))
        return denoise
