"""Building blocks of the UNet. Module names are the keys of the published checkpoints.

Block maths: CompVis/latent-diffusion (arXiv 2112.10752) and Stability-AI/stablediffusion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.attention.functions import Attention
from sd.attention.modules import CrossAttention, KeysValues, NativeAttention, to_native, to_separate
from sd.config.presets import UNetConfig
from sd.models.token_merging import merging


def timestep_embedding(timesteps: Tensor, channels: int, table_device: torch.device | None = None) -> Tensor:
    """Sinusoidal embedding, cosines first: timesteps [B], may be fractional -> [B, channels] float32.

    table_device: device that computes the frequencies, None for that of the timesteps. The original computes them on the CPU
    and copies them at every call, which synchronises with the device (Stability-AI/stablediffusion, pull request 375).
    """
    half = channels // 2
    device = timesteps.device if table_device is None else table_device
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=device, dtype=torch.float32))
    frequencies = frequencies.to(timesteps.device)
    angles = timesteps.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def guidance_embedding(scale: float, channels: int) -> Tensor:
    """Sinusoidal embedding of a guidance scale, sines first: [1, channels] float32 on the CPU.

    Of w = scale - 1 (arXiv 2310.04378); the frequencies end at 1/10000, unlike those of `timestep_embedding`.
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, dtype=torch.float32))
    angles = 1000.0 * (scale - 1.0) * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def repeated(x: Tensor, count: int) -> Tensor:
    """x [B, ...] as often as makes [count, ...], with the order of its memory."""
    if len(x) == count:
        return x
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):  # of which inductor would write NCHW
        return torch.cat([x.permute(0, 2, 3, 1)] * (count // len(x))).permute(0, 3, 1, 2)
    return torch.cat([x] * (count // len(x)))


class GroupNorm(nn.GroupNorm):
    """GroupNorm in the dtype of its weights, which under autocast is fp32, then SiLU if `silu`.

    The output has the dtype of the input. Kernels for half weights accumulate their statistics in fp32 in any case.
    nhwc: compute in NHWC order and fp32 by elementary operators, of which inductor makes two kernels that read and write NHWC.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, silu: bool = False):
        super().__init__(groups, channels, eps)
        self.silu, self.nhwc = silu, False

    def forward(self, x: Tensor) -> Tensor:  # [B, C, ...]
        if self.nhwc:
            return self._forward_nhwc(x)
        # Not by super(): guards of compiled code then look up the class of each norm at every call.
        normed = F.group_norm(x.to(self.weight.dtype), self.num_groups, self.weight, self.bias, self.eps).to(x.dtype)
        return F.silu(normed) if self.silu else normed

    def _forward_nhwc(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        batch, channels, height, width = x.shape
        groups = self.num_groups
        of_group = x.permute(0, 2, 3, 1).reshape(batch, height * width, groups, channels // groups).float()
        var, mean = torch.var_mean(of_group, dim=(1, 3), unbiased=False)
        # Applied in the shape of the image, from which inductor concludes the order of the channels-last result.
        deviation, mean = [
            of_group[:, :, None].expand(batch, groups, channels // groups).reshape(batch, channels, 1, 1)
            for of_group in ((var + self.eps).rsqrt(), mean)
        ]
        weight, bias = [weights.float().reshape(1, channels, 1, 1) for weights in (self.weight, self.bias)]
        normed = (x.float() - mean) * deviation * weight + bias
        return (F.silu(normed) if self.silu else normed).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its weights, as autocast does on a GPU; torch 1.13 raises on the CPU.

    The output has the dtype of the input, which also disables nn.MultiheadAttention's fast path under autocast: torch 2.0
    cannot run it on the CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.to(x.dtype)


class GEGLU(nn.Module):
    """Gated linear unit with exact (erf) GELU (arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, C] -> [B, S, inner]
        x = self.proj(x)
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU and a projection back; `net.1` was a dropout of 0 in the original and holds no weights."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; each with its LayerNorm before and a residual."""

    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1: CrossAttention | NativeAttention = CrossAttention(width, width, heads, width // heads)
        self.ff = FeedForward(width)
        self.attn2: CrossAttention | NativeAttention = CrossAttention(width, context_dim, heads, width // heads)
        self.norm1 = LayerNorm(width)
        self.norm2 = LayerNorm(width)
        self.norm3 = LayerNorm(width)
        self.token_merging = 0.0  # fraction of the tokens; approximate
        self.kernels = ",".join(Attention().kernels)

    def forward(self, x: Tensor, context: Tensor | KeysValues, size: tuple[int, int]) -> Tensor:
        """x [B, S, C] of an image of `size` (H, W) -> [N, S, C]. context: [N, T, C'] or its keys and values."""
        # Never true; read so that torch.compile guards on the kernel choice, which is a context around the call.
        if not self.kernels:
            raise ValueError("no kernel is allowed")
        x = self.attentions(x, context, size)
        x = self.ff(self.norm3(x)) + x
        return x

    def attentions(self, x: Tensor, context: Tensor | KeysValues, size: tuple[int, int]) -> Tensor:
        """`forward` without the feed-forward layer."""
        if self.token_merging:
            tokens = self.norm1(x)
            merge, unmerge = merging(tokens, size, self.token_merging)
            x = unmerge(self.attn1(merge(tokens))) + x
        else:
            x = self.attn1(self.norm1(x)) + x
        x = repeated(x, len(context[0] if isinstance(context, tuple) else context))
        x = self.attn2(self.norm2(x), context) + x
        return x

    def inputs_of_fold(self, x: Tensor, context: Tensor | KeysValues, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """x before the feed-forward layer [N, S, C], and the input of its last linear layer [N, S, 4 C]."""
        x = self.attentions(x, context, size)
        return x, self.ff.net[0](self.norm3(x))

    def project_context(self, context: Tensor) -> KeysValues:
        """Keys and values [B, T, H, D] of the cross-attention to the context [B, T, C']."""
        assert isinstance(self.attn2, CrossAttention), "nn.MultiheadAttention projects by itself"
        return self.attn2.keys_values(context)

    def output_layers(self) -> list[nn.Module]:
        """The linear layers before the residuals, without those inside of nn.MultiheadAttention."""
        attentions = (self.attn1, self.attn2)
        return [*(x.to_out[0] for x in attentions if isinstance(x, CrossAttention)), self.ff.net[2]]

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
    """Transformer blocks over the positions of an image; SD1 projects with 1x1 convolutions, SD2 with linear layers.

    downsampling: how much smaller the image is than the UNet's input. folded_weight [C, 5 C], folded_bias [C]: see `fold`.
    """

    index: int  # among the UNet's SpatialTransformers
    folded_weight: Tensor | None
    folded_bias: Tensor | None

    def __init__(self, config: UNetConfig, channels: int, downsampling: int):
        super().__init__()
        self.use_linear, self.downsampling = config.use_linear_in_transformer, downsampling
        self.norm = GroupNorm(config.norm_groups, channels, eps=1e-6)

        def projection() -> nn.Module:
            return nn.Linear(channels, channels) if self.use_linear else nn.Conv2d(channels, channels, 1)

        self.proj_in = projection()
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, config.context_dim, config.heads(channels))
            for _ in range(config.transformer_depth)
        )
        self.proj_out = projection()
        for name in ("folded_weight", "folded_bias"):
            self.register_buffer(name, None, persistent=False)  # no key of the checkpoint

    @torch.no_grad()
    def fold(self, enabled: bool) -> None:
        """Replace two linear layers without a non-linearity between them by one product, or undo it.

        P (x + F g + f) + p = [P, P F] [x, g] + (P f + p) for P, p of proj_out and F, f of the feed-forward layer's output, whose
        input is g; the matrix is computed in fp64, which no setting of the process rounds, and rounded once. It changes in
        place where it exists. It is to be called again after an in-place change of the weights.
        """
        if not enabled:
            self.folded_weight = self.folded_bias = None
            return
        block = self.transformer_blocks[-1]
        assert isinstance(block, BasicTransformerBlock)
        inner, out = block.ff.net[2], self.proj_out
        assert isinstance(inner, nn.Linear) and isinstance(out, (nn.Linear, nn.Conv2d)) and out.bias is not None
        matrix, dtype = out.weight.flatten(1).double(), inner.weight.dtype
        weight = torch.cat([matrix, matrix @ inner.weight.double()], dim=1).to(dtype)
        bias = (matrix @ inner.bias.double() + out.bias.double()).to(dtype)
        if self.folded_weight is None or self.folded_bias is None or self.folded_weight.dtype != dtype:
            self.folded_weight, self.folded_bias = weight, bias
        else:
            self.folded_weight.copy_(weight)
            self.folded_bias.copy_(bias)

    def forward(self, x: Tensor, contexts: Sequence[Tensor | KeysValues]) -> Tensor:
        """x [B, C, H, W] -> [N, C, H, W]; contexts: one for each block, of batch N.

        Channels-last images become tokens and images again by views alone.
        """
        height, width = x.shape[2:]
        h: Tensor = self.norm(x)
        if not self.use_linear:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # [B, H*W, C]
        if self.use_linear:
            h = self.proj_in(h)
        *blocks, last = self.transformer_blocks  # not by a slice, a new ModuleList, which guards check at every call
        for block, context in zip(blocks, contexts):
            h = block(h, context, (height, width))
        if self.folded_weight is not None:
            h = F.linear(torch.cat(last.inputs_of_fold(h, contexts[-1], (height, width)), dim=-1), self.folded_weight)  # type: ignore[operator]
            h = h + self.folded_bias.to(h.dtype)  # type: ignore[union-attr]
        else:
            h = last(h, contexts[-1], (height, width))
            if self.use_linear:
                h = self.proj_out(h)
        h = h.transpose(1, 2).unflatten(2, (height, width))
        if not self.use_linear and self.folded_weight is None:
            h = self.proj_out(h)
        return repeated(x, len(h)) + h


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the timestep embedding added between them; the norms before them include the SiLU."""

    index: int  # among the UNet's ResBlocks

    def __init__(self, channels: int, out_channels: int, embedding: int, norm_groups: int):
        super().__init__()
        self.out_channels = out_channels
        self.in_layers = nn.Sequential(
            GroupNorm(norm_groups, channels, silu=True),
            nn.Identity(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(norm_groups, out_channels, silu=True),
            nn.Identity(),
            nn.Identity(),  # a dropout of 0 in the original
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', H, W]; time [B or 1, C', 1, 1]: the result of `project_time`."""
        h = self.out_layers(self.in_layers(x) + time)
        x = self.skip_connection(x) + h
        return x

    def project_time(self, emb: Tensor) -> Tensor:
        """Time embedding [N, E] -> the values added at every position [N, C', 1, 1]."""
        projected: Tensor = self.emb_layers(emb)
        return projected[:, :, None, None]


class Downsample(nn.Module):
    """Halve height and width by a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out
