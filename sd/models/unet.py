"""The denoising network. Module names are the keys under `model.diffusion_model.` of the published checkpoints."""

from __future__ import annotations

import torch
from torch import nn

from sd.attention.functions import Attention, allowed_kernels
from sd.attention.modules import CrossAttention
from sd.config.presets import UNetConfig
from sd.models.layers import (
    BasicTransformerBlock,
    Downsample,
    GroupNorm,
    ResBlock,
    SpatialTransformer,
    Upsample,
    timestep_embedding,
)


class Stage(nn.ModuleList):
    """Modules that run one after the other, each given what it takes: its time projection, its contexts or neither."""

    def forward(self, x, times, contexts):
        """x [B, C, H, W] -> [B, C', H', W']; times, contexts: of all modules of the UNet, by `module.index`."""
        for module in self:
            if isinstance(module, ResBlock):
                x = module(x, times[module.index])
            elif isinstance(module, SpatialTransformer):
                x = module(x, contexts[module.index])
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
            module = SpatialTransformer(
                channels,
                config.context_dim,
                config.heads(channels),
                config.transformer_depth,
                config.use_linear_in_transformer,
                groups,
            )
            module.downsampling = factor
            return module

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
            GroupNorm(groups, channels, silu=True),
            nn.Identity(),  # the norm has the SiLU
            nn.Conv2d(channels, config.out_channels, 3, padding=1),
        )
        self.frequencies_device = None  # see sd.models.layers.timestep_embedding
        self.quantisation = "none"  # see sd.optimise.approximate
        self.res_blocks = [module for module in self.modules() if isinstance(module, ResBlock)]
        self.transformers = [module for module in self.modules() if isinstance(module, SpatialTransformer)]
        for modules in (self.res_blocks, self.transformers):
            for i, module in enumerate(modules):
                module.index = i

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights, to which the inputs are cast."""
        return self.out[2].weight.dtype

    def forward(self, x, timesteps, context):
        """Predict eps or v.

        x [B, in_channels, h, w], h and w multiples of 2^(levels - 1); timesteps [B], of any number type, may be
        fractional; context [B, T, context_dim]. Returns [B, out_channels, h, w] in the dtype of the computation.
        In place of timesteps, a row of `time_table`; in place of context, what `project_context` made of it.
        """
        with allowed_kernels(self.attention):
            return self.denoise(x, timesteps, context)

    def forward_with_features(self, x, timesteps, context, deep):
        """`denoise_with_features` under the kernel choice."""
        with allowed_kernels(self.attention):
            return self.denoise_with_features(x, timesteps, context, deep)

    def denoise(self, x, timesteps, context):
        """What `forward` runs under its kernel choice; the part that torch.compile is given."""
        return self.denoise_with_features(x, timesteps, context)[0]

    def denoise_with_features(self, x, timesteps, context, deep=None):
        """(what `denoise` returns, what the last stage was given by the stage before it).

        deep: the latter from an earlier call, near in time, in place of all stages between (see sd.optimise.approximate).
        """
        times, contexts = self._times(timesteps), self._contexts(context)
        first = self.input_blocks[0](x.to(self.dtype), times, contexts)
        if deep is None:
            h, skips = first, []
            for stage in self.input_blocks[1:]:
                h = stage(h, times, contexts)
                skips.append(h)
            h = self.middle_block(h, times, contexts)
            for stage in self.output_blocks[:-1]:
                h = stage(torch.cat([h, skips.pop()], dim=1), times, contexts)
            deep = h
        return self.out(self.output_blocks[-1](torch.cat([deep, first], dim=1), times, contexts)), deep

    def _times(self, timesteps):
        """What every ResBlock adds, by its index: split off a row of the table, or computed."""
        if timesteps.dim() == 4:
            return timesteps.split([block.emb_layers[1].out_features for block in self.res_blocks], dim=1)
        emb = timestep_embedding(timesteps, self.config.model_channels, self.frequencies_device)
        emb = self.time_embed(emb.to(self.dtype))
        return [block.project_time(emb) for block in self.res_blocks]

    def _contexts(self, context):
        """What every SpatialTransformer's blocks take, by its index."""
        if isinstance(context, tuple):
            return context
        context = context.to(self.dtype)
        return [[context] * len(transformer.transformer_blocks) for transformer in self.transformers]

    def time_table(self, timesteps):
        """timesteps [N] -> [N, P, 1, 1]: the time embedding's projections for all ResBlocks, side by side.

        A row [1, P, 1, 1] may be given to `forward` in place of its timesteps.
        """
        return torch.cat(self._times(timesteps), dim=1)

    def project_context(self, context):
        """context [B, T, context_dim] -> keys and values of all cross-attentions, each [B, T, H, D].

        They may be given to `forward` in place of the context. Not where attention is `mha`, which projects by itself.
        """
        context = context.to(self.dtype)
        return tuple(
            tuple(block.attn2.keys_values(context) for block in transformer.transformer_blocks)
            for transformer in self.transformers
        )

    def fuse_projections(self, self_attention: bool, cross_attention: bool) -> None:
        """Compute q, k, v of self-attention, or k and v of cross-attention, by one product over one matrix; or not."""
        for block in self.transformer_blocks():
            for attention, names, fused in (
                (block.attn1, "qkv", self_attention),
                (block.attn2, "kv", cross_attention),
            ):
                if isinstance(attention, CrossAttention):
                    attention.fuse(names if fused else "")

    def transformer_blocks(self) -> list[BasicTransformerBlock]:
        """Every transformer block, in the order in which they run."""
        return [module for module in self.modules() if isinstance(module, BasicTransformerBlock)]

    def head_dims(self) -> set[int]:
        """The head sizes that an attention kernel must take."""
        return {block.attn1.head_dim for block in self.transformer_blocks()}

    def use_attention(self, attention: Attention) -> None:
        """Switch every attention to `attention` over the same weights; no check that it runs here (see sd.optimise.optimisations)."""
        for block in self.transformer_blocks():
            block.use_attention(attention)
        self.attention = attention
