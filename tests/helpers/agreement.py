"""Outputs of a model with another attention, precision or device, and their bounds; on the CPU and on a GPU."""

from __future__ import annotations

import contextlib
import os
import random

import pytest
import torch

from sd import Optimisations, StableDiffusion
from sd.attention.functions import CHOICES
from sd.attention.observation import ObservedCall
from sd.choices import ATTENTION_WITH_KERNELS
from sd.features import has
from sd.optimise.optimisations import OWN_KERNELS

SEED = int(os.environ.get("SD_PERF_SEED") or random.SystemRandom().getrandbits(32))
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]

# Name -> (precision, whether fp32 products and convolutions of a GPU may use TF32)
SETTINGS = {
    "full": ("full", False),
    "full-tf32": ("full", True),
    "autocast": ("autocast", False),
    "fp16": ("fp16", False),
    "bf16": ("bf16", False),
}


@contextlib.contextmanager
def tf32(allowed: bool):
    """Context that allows or forbids TF32 in matrix products and convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def optimisations(name: str, precision: str = "full") -> Optimisations:
    """The attention `name` of sd.attention.functions.CHOICES in that precision."""
    choice = CHOICES[name]
    own = {f"{choice.own}_attention": True} if choice.own else {}
    if choice.own and precision != OWN_KERNELS[f"{choice.own}_attention"]:
        pytest.skip(f"{choice.own}_attention computes in another precision")
    return Optimisations(choice.implementation, choice.kernels, precision=precision, **own)


def unet_output(model: StableDiffusion, seed: int, size: int, batch: int = 2):
    """The UNet on random input: (float32 [B, 4, size, size] on the CPU, attention kernels that ran)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, size, size, generator=generator)
    context = torch.randn(batch, 77, model.config.unet.context_dim, generator=generator)
    timesteps = torch.linspace(1, 981, batch)
    unet = ObservedCall(model.unet, observe_call=1)
    with torch.no_grad(), model.optimisations.autocast(model.device):
        out = unet(*(tensor.to(model.device) for tensor in (x, timesteps, context)))
    return out.float().cpu(), unet.kernels


def unet_bound(setting: str, device: str) -> float:
    """Largest relative error of a UNet of any size against `original` in fp32.

    Measured for SD2's UNet with random weights at 32x32 on a CPU: 9e-7 in fp32, 1.6e-3 in fp16, 1.3e-2 in bf16 under
    autocast, 1.6 epsilons of the half types; the bound is 8 epsilons. TF32 rounds inputs of products to the 11 bits of fp16.
    """
    if setting == "full" or (setting == "full-tf32" and device == "cpu"):
        return 1e-5
    bf16 = setting == "bf16" or (setting == "autocast" and device == "cpu")
    return 8 * torch.finfo(torch.bfloat16 if bf16 else torch.float16).eps


def only_allowed_kernels(name: str, kernels: tuple[str, ...]) -> bool:
    """Whether the recorded kernels are among those that the attention `name` allows.

    `native_mha` is nn.MultiheadAttention's fused self-attention, which runs an allowed kernel, or on a CPU its own `math`.
    """
    choice = CHOICES[name]
    if choice.own:
        return kernels == (choice.own,)
    if choice.implementation == "original":
        return kernels == ("softmax",)
    if choice.implementation not in ("xformers", *ATTENTION_WITH_KERNELS):
        return True  # a backend added later, without an expected kernel
    if choice.restricted:
        return bool(kernels) and set(kernels) <= {*choice.kernels, "native_mha"}
    if choice.implementation == "mha" and not has("sdpa"):
        return set(kernels) <= {"softmax", "native_mha"}  # before SDPA its slow path is a plain softmax
    return bool(kernels) and "softmax" not in kernels


def images_of(model: StableDiffusion):
    """Two images of one prompt, int32 [2, 64, 64, 3].

    After 8 steps: after 4, bf16 with `original` itself had a PSNR down to 23 dB, after 8 never below 40 dB.
    """
    return model.txt2img(
        "a red star on a white background", steps=8, sampler="ddim", scale=4.0, seed=2, batch=2
    ).images.int()


def psnr(actual, expected, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB."""
    return (20 * torch.log10(peak / (actual.double() - expected.double()).pow(2).mean().sqrt())).item()
