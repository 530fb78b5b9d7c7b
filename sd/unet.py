"""The denoising network. Module names are the keys under `model.diffusion_model.` of the published checkpoints."""

from __future__ import annotations

import torch
from torch import nn

from sd.attention import Attention, allowed_kernels
from sd.config import UNetConfig
from sd.layers import (
    BasicTransformerBlock,
    Downsample,
    GroupNorm,
    ResBlock,
    SpatialTransformer,
    Upsample,
    timestep_embedding,
)


class Stage(nn.ModuleList):
    """Modules that run one after the other, each given what it takes: the embedding, the context or neither."""

    def forward(self, x, emb, context):
        for module in self:
            if isinstance(module, ResBlock):
                x = module(x, emb)
            elif isinstance(module, SpatialTransformer):
                x = module(x, context)
            else:
                x = module(x)
        return x


class UNet(nn.Module):
    """UNet with cross-attention to the prompt (arXiv 2112.10752); its layout is that of openaimodel.UNetModel."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.attention = Attention()
        groups = config.norm_groups
        embedding = 4 * config.model_channels

        def transformer(channels):
            return SpatialTransformer(
                channels,
                config.context_dim,
                config.heads(channels),
                config.transformer_depth,
                config.use_linear_in_transformer,
                groups,
            )

        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        channels = config.model_channels
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(config.in_channels, channels, 3, padding=1)])])
        skips, factor = [channels], 1
        for level, multiplier in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                stage = [ResBlock(channels, multiplier * config.model_channels, embedding, groups)]
                channels = multiplier * config.model_channels
                if factor in config.attention_resolutions:
                    stage.append(transformer(channels))
                self.input_blocks.append(Stage(stage))
                skips.append(channels)
            if level != len(config.channel_mult) - 1:
                self.input_blocks.append(Stage([Downsample(channels)]))
                skips.append(channels)
                factor *= 2

        self.middle_block = Stage(
            [
                ResBlock(channels, channels, embedding, groups),
                transformer(channels),
                ResBlock(channels, channels, embedding, groups),
            ]
        )

        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                stage = [ResBlock(channels + skips.pop(), multiplier * config.model_channels, embedding, groups)]
                channels = multiplier * config.model_channels
                if factor in config.attention_resolutions:
                    stage.append(transformer(channels))
                if level and i == config.num_res_blocks:
                    stage.append(Upsample(channels))
                    factor //= 2
                self.output_blocks.append(Stage(stage))

        self.out = nn.Sequential(
            GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, config.out_channels, 3, padding=1)
        )

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights, to which the inputs are cast."""
        return self.out[2].weight.dtype

    def forward(self, x, timesteps, context):
        """Predict eps or v.

        x [B, in_channels, h, w], h and w multiples of 2^(levels - 1); timesteps [B], of any number type, may be
        fractional; context [B, T, context_dim]. Returns [B, out_channels, h, w] in the dtype of the computation.
        """
        with allowed_kernels(self.attention):
            return self.denoise(x, timesteps, context)

    def denoise(self, x, timesteps, context):
        """What `forward` runs under its kernel choice; the part that torch.compile is given."""
        emb = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(self.dtype))
        context = context.to(self.dtype)
        h = x.to(self.dtype)
        skips = []
        for stage in self.input_blocks:
            h = stage(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)

    def transformer_blocks(self) -> list[BasicTransformerBlock]:
        """Every transformer block, in the order in which they run."""
        return [module for module in self.modules() if isinstance(module, BasicTransformerBlock)]

    def head_dims(self) -> set[int]:
        """The head sizes that an attention kernel must take."""
        return {block.attn1.head_dim for block in self.transformer_blocks()}

    def use_attention(self, attention: Attention) -> None:
        """Switch every attention to `attention` over the same weights; no check that it runs here (see sd.optimise)."""
        for block in self.transformer_blocks():
            block.use_attention(attention)
        self.attention = attention
