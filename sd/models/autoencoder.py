"""The KL autoencoder between pixels and latents. Module names are the keys under `first_stage_model.`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sd.attention.functions import Attention, allowed_kernels
from sd.config.presets import AutoencoderConfig
from sd.models.layers import GroupNorm, Upsample

EPS = 1e-6  # of every GroupNorm here; the UNet's ResBlocks have 1e-5


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions and a skip; the norms before them have the SiLUs."""

    def __init__(self, channels: int, out_channels: int, norm_groups: int):
        super().__init__()
        self.norm1 = GroupNorm(norm_groups, channels, eps=EPS, silu=True)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(norm_groups, out_channels, eps=EPS, silu=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x):
        h = self.conv2(self.norm2.of_convolution(self.conv1, self.norm1(x)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all cells, as wide as the block (512 in the released models)."""

    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        self.attend = Attention().function()
        self.kernels = ",".join(Attention().kernels)

    def forward(self, x):  # [B, C, H, W]
        if not self.kernels:  # never; read so that torch.compile guards on it, as in BasicTransformerBlock
            raise ValueError("no kernel is allowed")
        height, width = x.shape[2:]
        h = self.norm(x)
        # [B, H*W, 1, C]; a list, since torch 2.0 cannot compile a generator that is unpacked
        q, k, v = [layer(h).flatten(2).transpose(1, 2).unsqueeze(2) for layer in (self.q, self.k, self.v)]
        h = self.attend(q, k, v).squeeze(2).transpose(1, 2).unflatten(2, (height, width))
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halve height and width; the padding is at the right and the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def _middle(channels: int, norm_groups: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = ResnetBlock(channels, channels, norm_groups)
    mid.attn_1 = AttnBlock(channels, norm_groups)
    mid.block_2 = ResnetBlock(channels, channels, norm_groups)
    return mid


class Encoder(nn.Module):
    """Pixels to the moments of the latent distribution."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels, groups = config.channels, config.norm_groups
        self.conv_in = nn.Conv2d(config.image_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(config.channel_mult):
            down = nn.Module()
            down.block = nn.ModuleList()
            for _ in range(config.num_res_blocks):
                down.block.append(ResnetBlock(channels, multiplier * config.channels, groups))
                channels = multiplier * config.channels
            if level != len(config.channel_mult) - 1:
                down.downsample = Downsample(channels)
            self.down.append(down)
        self.mid = _middle(channels, groups)
        self.norm_out = GroupNorm(groups, channels, eps=EPS, silu=True)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for down in self.down:
            for block in down.block:
                h = block(h)
            if hasattr(down, "downsample"):
                h = down.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(self.norm_out(h))


class Decoder(nn.Module):
    """Latents to pixels. `up` is indexed by level, so its last entry runs first."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        groups = config.norm_groups
        channels = config.channels * config.channel_mult[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = _middle(channels, groups)
        levels = []
        for level, multiplier in reversed(list(enumerate(config.channel_mult))):
            up = nn.Module()
            up.block = nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                up.block.append(ResnetBlock(channels, multiplier * config.channels, groups))
                channels = multiplier * config.channels
            if level:
                up.upsample = Upsample(channels)
            levels.append(up)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = GroupNorm(groups, channels, eps=EPS, silu=True)
        self.conv_out = nn.Conv2d(channels, config.image_channels, 3, padding=1)

    def forward(self, z):
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for up in reversed(self.up):
            for block in up.block:
                h = block(h)
            if hasattr(up, "upsample"):
                h = up.upsample(h)
        return self.conv_out(self.norm_out(h))


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

    def encode(self, images):
        """images [B, 3, H, W] in [-1, 1] -> mean and log variance of the latents, each [B, 4, H/8, W/8] float32."""
        with allowed_kernels(self.attention):
            moments = self.quant_conv(self.encoder(images.to(self.dtype))).float()
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def decode(self, latents):
        """latents [B, 4, h, w], already divided by the scale factor -> [B, 3, 8h, 8w] in about [-1, 1], float32."""
        with allowed_kernels(self.attention):
            return self.to_pixels(latents)

    def to_pixels(self, latents):
        """What `decode` runs under its kernel choice; the part that torch.compile is given."""
        return self.decoder(self.post_quant_conv(latents.to(self.dtype))).float()

    def head_dim(self) -> int:
        """Width of the single attention head."""
        return self.decoder.mid.attn_1.q.in_channels

    def use_attention(self, attention: Attention) -> None:
        """Switch both attention blocks to `attention`; see sd.attention.functions.for_head_dim for what a 512-wide head can take."""
        for block in (self.encoder.mid.attn_1, self.decoder.mid.attn_1):
            block.attend, block.kernels = attention.function(), ",".join(attention.kernels)
        self.attention = attention
