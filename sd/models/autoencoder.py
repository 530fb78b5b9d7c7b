"""The KL autoencoder between pixels and latents. Module names are the keys under `first_stage_model.`."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.attention.functions import Attention, allowed_kernels
from sd.config.presets import AutoencoderConfig
from sd.models.layers import GroupNorm, Upsample

EPS = 1e-6  # of every GroupNorm here; the UNet's ResBlocks have 1e-5


def _sequence(**modules: nn.Module) -> nn.Sequential:
    """Modules that run in this order under these names."""
    return nn.Sequential(OrderedDict(modules))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions and a skip connection; the norms before them include the SiLU."""

    def __init__(self, channels: int, out_channels: int, norm_groups: int):
        super().__init__()
        self.norm1 = GroupNorm(norm_groups, channels, eps=EPS, silu=True)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(norm_groups, out_channels, eps=EPS, silu=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', H, W]
        h: Tensor = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions; the head is as wide as the block (512 in the released models)."""

    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        self.attend = Attention().function()
        self.kernels = ",".join(Attention().kernels)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        if not self.kernels:  # never true; read so that torch.compile guards on it, as in BasicTransformerBlock
            raise ValueError("no kernel is allowed")
        height, width = x.shape[2:]
        h = self.norm(x)
        # [B, H*W, 1, C]; a list, since torch 2.0 cannot compile a generator that is unpacked
        q, k, v = [layer(h).flatten(2).transpose(1, 2).unsqueeze(2) for layer in (self.q, self.k, self.v)]
        # A view in NHWC. For one image a transposed view would keep attention's stride of the batch, from which PyTorch
        # concludes NCHW, and the convolution would copy.
        h = self.attend(q, k, v).reshape(len(x), height, width, -1).permute(0, 3, 1, 2)
        x = x + self.proj_out(h)
        return x


class Downsample(nn.Module):
    """Halve height and width; padded at the right and the bottom only, as in the original."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


def _middle(channels: int, norm_groups: int) -> nn.Sequential:
    return _sequence(
        block_1=ResnetBlock(channels, channels, norm_groups),
        attn_1=AttnBlock(channels, norm_groups),
        block_2=ResnetBlock(channels, channels, norm_groups),
    )


def _blocks(channels: int, out_channels: int, count: int, norm_groups: int) -> nn.Sequential:
    widths = [channels] + [out_channels] * (count - 1)
    return nn.Sequential(*(ResnetBlock(width, out_channels, norm_groups) for width in widths))


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] to the moments [B, 8, H/8, W/8] of the latent distribution."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels, groups = config.channels, config.norm_groups
        self.conv_in = nn.Conv2d(config.image_channels, channels, 3, padding=1)
        levels: list[nn.Module] = []
        for i, multiplier in enumerate(config.channel_mult):
            width = multiplier * config.channels
            level = _sequence(block=_blocks(channels, width, config.num_res_blocks, groups))
            if i != len(config.channel_mult) - 1:
                level.add_module("downsample", Downsample(width))
            levels.append(level)
            channels = width
        self.down = nn.Sequential(*levels)
        self.mid = _middle(channels, groups)
        self.norm_out = GroupNorm(groups, channels, eps=EPS, silu=True)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_out(self.norm_out(self.mid(self.down(self.conv_in(x)))))
        return out


class Decoder(nn.Module):
    """Latents [B, 4, h, w] to pixels [B, 3, 8h, 8w]. `up` is indexed by level, so its last entry runs first."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        groups = config.norm_groups
        channels = config.channels * config.channel_mult[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = _middle(channels, groups)
        levels: list[nn.Module] = []
        for i, multiplier in reversed(list(enumerate(config.channel_mult))):
            width = multiplier * config.channels
            level = _sequence(block=_blocks(channels, width, config.num_res_blocks + 1, groups))
            if i:
                level.add_module("upsample", Upsample(width))
            levels.append(level)
            channels = width
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = GroupNorm(groups, channels, eps=EPS, silu=True)
        self.conv_out = nn.Conv2d(channels, config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h: Tensor = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        out: Tensor = self.conv_out(self.norm_out(h))
        return out


class Autoencoder(nn.Module):
    """AutoencoderKL of CompVis/latent-diffusion, without the latent scale factor, which belongs to the pipeline."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.attention = Attention()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights, to which the inputs are cast."""
        return self.post_quant_conv.weight.dtype

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] in [-1, 1] -> mean and log variance of the latents, each [B, 4, H/8, W/8] float32."""
        with allowed_kernels(self.attention):
            moments = self.quant_conv(self.encoder(images.to(self.dtype))).float()
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, 4, h, w], already divided by the scale factor -> [B, 3, 8h, 8w] in about [-1, 1], float32."""
        with allowed_kernels(self.attention):
            return self.to_pixels(latents)

    def to_pixels(self, latents: Tensor) -> Tensor:
        """`decode` without the kernel context; torch.compile replaces this method."""
        pixels: Tensor = self.decoder(self.post_quant_conv(latents.to(self.dtype)))
        return pixels.float()

    def head_dim(self) -> int:
        """Width of the single attention head."""
        return self.decoder.conv_in.out_channels

    def use_attention(self, attention: Attention) -> None:
        """Switch both attention blocks to `attention`; see sd.attention.availability.for_head_dim for wide heads."""
        for block in self.modules():
            if isinstance(block, AttnBlock):
                block.attend, block.kernels = attention.function(), ",".join(attention.kernels)
        self.attention = attention
