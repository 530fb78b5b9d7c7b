"""Shapes and error bounds of the Triton kernels against float64, by the interpreter on a CPU and on a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Relative norm of the error. Half types: one rounding of the output; Triton's interpreter truncates bf16, a GPU rounds it.
BOUNDS = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
# (cells, channels) of the UNet's norms at 512 and 768 pixels, and of the VAE's.
UNET_SHAPES = [
    *((64, channels) for channels in (1280, 2560)),
    *((256, channels) for channels in (640, 1280, 1920, 2560)),
    *((1024, channels) for channels in (320, 640, 960, 1280, 1920)),
    *((4096, channels) for channels in (320, 640, 960)),
    *((144, channels) for channels in (1280, 2560)),
    *((576, channels) for channels in (640, 1280, 1920, 2560)),
    *((2304, channels) for channels in (320, 640, 960, 1280, 1920)),
    *((9216, channels) for channels in (320, 640, 960)),
]
VAE_SHAPES = [(4096, 512), (16384, 512), (65536, 512), (65536, 256), (262144, 256), (262144, 128), (589824, 128)]


def group_norm_error(
    kernel, shape, groups, dtype, device="cpu", mean=0.0, add=None, conv_bias=True, silu=True
) -> float:
    """Relative error of the kernel on seeded random numbers; asserts shape, dtype and layout.

    shape [B, C, H, W]; add: batch size of the added tensor, or None.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator, device=device)

    batch, channels, height, width = shape
    x = (draw(batch, height, width, channels) + mean).to(dtype).permute(0, 3, 1, 2)
    weight, bias, conv_offset = (draw(channels).to(dtype) for _ in range(3))
    added = None if add is None else draw(add, channels, 1, 1).to(dtype)
    out = kernel(x, weight, bias, groups, 1e-5, conv_offset if conv_bias else None, added, silu)
    assert (out.shape, out.dtype) == (x.shape, dtype)
    assert out.is_contiguous(memory_format=torch.channels_last)
    exact = x.double()
    if conv_bias:
        exact = exact + conv_offset.double()[:, None, None]
    if added is not None:
        exact = exact + added.double()
    exact = F.group_norm(exact, groups, weight.double(), bias.double(), 1e-5)
    exact = F.silu(exact) if silu else exact
    return ((out.double() - exact).norm() / exact.norm()).item()


def group_norm_bound(dtype, mean=0.0) -> float:
    """The bound for inputs with a mean: every fp32 result has the rounding error of the mean beside a deviation of 1."""
    return BOUNDS[dtype] + 2 * mean * 2**-24


def geglu_error(kernel, shape, dtype, device="cpu") -> float:
    """As `group_norm_error`; shape [..., 2 * N]."""
    generator = torch.Generator(device).manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator, device=device)).to(dtype)
    out = kernel(x)
    assert (out.shape, out.dtype) == ((*shape[:-1], shape[-1] // 2), dtype)
    value, gate = x.double().chunk(2, dim=-1)
    exact = value * F.gelu(gate)
    return ((out.double() - exact).norm() / exact.norm()).item()
