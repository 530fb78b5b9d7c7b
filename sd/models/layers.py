"""Building blocks of the UNet. Module names are the keys of the published checkpoints.

Block maths: CompVis/latent-diffusion (arXiv 2112.10752) and Stability-AI/stablediffusion.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from sd.attention.functions import Attention
from sd.attention.modules import CrossAttention, NativeAttention, to_native, to_separate
from sd.models.token_merging import merging


def timestep_embedding(timesteps, channels: int, table_device=None):
    """Sinusoidal embedding, cosines first: timesteps [B], may be fractional -> [B, channels] float32.

    table_device: where the frequencies are made, None for the timesteps' own device. The original makes them on the CPU
    and copies them at every call, which waits for the device (Stability-AI/stablediffusion, pull request 375).
    """
    half = channels // 2
    device = timesteps.device if table_device is None else table_device
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=device, dtype=torch.float32))
    frequencies = frequencies.to(timesteps.device)
    angles = timesteps.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class GroupNorm(nn.GroupNorm):
    """GroupNorm in the dtype of its weights, which under autocast is fp32, and SiLU after it where `silu` says so.

    The output has the dtype of the input. Kernels for half weights accumulate their statistics in fp32 anyway.
    """

    kernel = None  # or sd.optimise.triton_kernels.group_norm, by sd.optimise.kernels

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, silu: bool = False):
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x):
        if self.kernel is not None:
            return self.kernel(x, self.weight, self.bias, self.num_groups, self.eps, silu=self.silu)
        x = super().forward(x.to(self.weight.dtype)).to(x.dtype)
        return F.silu(x) if self.silu else x

    def of_convolution(self, convolution, x, add=None):
        """The norm of convolution(x) + add; add [B or 1, C, 1, 1].

        A kernel adds what is the same at every cell for nothing, so it is also given the convolution's bias, which cuDNN
        would add in a pass of its own.
        """
        if self.kernel is None:
            x = convolution(x)
            return self(x if add is None else x + add)
        x = F.conv2d(x, convolution.weight, None, padding=convolution.padding)
        return self.kernel(x, self.weight, self.bias, self.num_groups, self.eps, convolution.bias, add, self.silu)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its weights, as autocast does by itself on a GPU; torch 1.13 raises on the CPU.

    The output has the dtype of the input, which also keeps nn.MultiheadAttention off its fast path under autocast, which
    cannot do that on the CPU of torch 2.0.
    """

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class GEGLU(nn.Module):
    """Gated linear unit with exact (erf) GELU (arXiv 2002.05202)."""

    kernel = None  # or sd.optimise.triton_kernels.geglu, by sd.optimise.kernels

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x):
        x = self.proj(x)
        if self.kernel is not None:
            return self.kernel(x)
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU and a projection back; `net.1` was a dropout of 0 in the original and holds no weights."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x):
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; each with its LayerNorm before and a residual."""

    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads, width // heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context_dim, heads, width // heads)
        self.norm1 = LayerNorm(width)
        self.norm2 = LayerNorm(width)
        self.norm3 = LayerNorm(width)
        self.token_merging = 0.0  # part of the tokens; approximate
        self.kernels = ",".join(Attention().kernels)

    def forward(self, x, context, size):
        """x [B, S, C] of an image of `size` -> [B, S, C]. context: [B, T, C'] or its keys and values (CrossAttention)."""
        if (
            not self.kernels
        ):  # never; read so that torch.compile guards on the choice, which is a context around the call
            raise ValueError("no kernel is allowed")
        if self.token_merging:
            tokens = self.norm1(x)
            merge, unmerge = merging(tokens, size, self.token_merging)
            x = unmerge(self.attn1(merge(tokens))) + x
        else:
            x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x

    def use_attention(self, attention: Attention) -> None:
        """Switch both attentions to `attention`, over the same weights."""
        self.kernels = ",".join(attention.kernels)
        for name in ("attn1", "attn2"):
            module = getattr(self, name)
            if attention.implementation == "mha":
                if isinstance(module, CrossAttention):
                    setattr(self, name, to_native(module))
            else:
                if isinstance(module, NativeAttention):
                    setattr(self, name, to_separate(module))
                getattr(self, name).attend = attention.function()


class SpatialTransformer(nn.Module):
    """Transformer blocks over the cells of an image; SD1 projects with 1x1 convolutions, SD2 with linear layers."""

    def __init__(self, channels: int, context_dim: int, heads: int, depth: int, use_linear: bool, norm_groups: int):
        super().__init__()
        self.use_linear = use_linear
        self.norm = GroupNorm(norm_groups, channels, eps=1e-6)
        projection = nn.Linear if use_linear else (lambda inner, outer: nn.Conv2d(inner, outer, 1))
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, context_dim, heads) for _ in range(depth)
        )
        self.proj_out = projection(channels, channels)

    def forward(self, x, contexts):
        """x [B, C, H, W] -> [B, C, H, W]; contexts: one for each block, as it takes it.

        Channels-last images become tokens and images again by views alone.
        """
        height, width = x.shape[2:]
        h = self.norm(x)
        if not self.use_linear:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # [B, H*W, C]
        if self.use_linear:
            h = self.proj_in(h)
        for block, context in zip(self.transformer_blocks, contexts):
            h = block(h, context, (height, width))
        if self.use_linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).unflatten(2, (height, width))
        if not self.use_linear:
            h = self.proj_out(h)
        return x + h


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the timestep embedding added between them; the norms before them have the SiLUs."""

    def __init__(self, channels: int, out_channels: int, embedding: int, norm_groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(norm_groups, channels, silu=True),
            nn.Identity(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(norm_groups, out_channels, silu=True),
            nn.Identity(),
            nn.Identity(),  # was a dropout of 0
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, time):
        """x [B, C, H, W] -> [B, C', H, W]; time [B or 1, C', 1, 1]: what `project_time` made of the embedding."""
        h = self.out_layers[0].of_convolution(self.in_layers[2], self.in_layers[0](x), time)
        return self.skip_connection(x) + self.out_layers[3](h)

    def project_time(self, emb):
        """Time embedding [N, E] -> what is added at every cell [N, C', 1, 1]."""
        return self.emb_layers(emb)[:, :, None, None]


class Downsample(nn.Module):
    """Halve height and width by a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
