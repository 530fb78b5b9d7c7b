"""The denoising network. Module names are the keys under `model.diffusion_model.` of the published checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sd.attention.functions import Attention, allowed_kernels
from sd.attention.modules import CrossAttention, KeysValues, ProjectedContext
from sd.config.presets import UNetConfig
from sd.models.layers import (
    BasicTransformerBlock,
    Downsample,
    GroupNorm,
    ResBlock,
    SpatialTransformer,
    Upsample,
    guidance_embedding,
    repeated,
    timestep_embedding,
)

BlockContexts = Sequence[Sequence[Tensor | KeysValues]]  # by SpatialTransformer, then by block


class Stage(nn.ModuleList):
    """Modules in sequence, with the time projection for ResBlocks and the contexts for SpatialTransformers."""

    def forward(self, x: Tensor, times: Sequence[Tensor], contexts: BlockContexts) -> Tensor:
        """x [B, C, H, W] -> [B, C', H', W']; times, contexts: for all modules of the UNet, by `module.index`."""
        for module in self:
            if isinstance(module, ResBlock):
                x = module(x, times[module.index])
            elif isinstance(module, SpatialTransformer):
                x = module(x, contexts[module.index])
            else:
                x = module(x)
        return x


class UNet(nn.Module):
    """UNet with cross-attention to the prompt (arXiv 2112.10752), in the layout of openaimodel.UNetModel."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.attention = Attention()
        self.nhwc = False  # see `_concatenate`
        groups = config.norm_groups
        embedding = 4 * config.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )

        if config.guidance_embedding is not None:  # named as in published checkpoints, which follow diffusers here
            projection = nn.Linear(config.guidance_embedding, config.model_channels, bias=False)
            self.time_embedding = nn.ModuleDict({"cond_proj": projection})

        def blocks(channels: int, out_channels: int, downsampling: int) -> list[nn.Module]:
            modules: list[nn.Module] = [ResBlock(channels, out_channels, embedding, groups)]
            if downsampling in config.attention_resolutions:
                modules.append(SpatialTransformer(config, out_channels, downsampling))
            return modules

        channels = config.model_channels
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(config.in_channels, channels, 3, padding=1)])])
        skips, downsampling = [channels], 1
        for level, multiplier in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(Stage(blocks(channels, multiplier * config.model_channels, downsampling)))
                channels = multiplier * config.model_channels
                skips.append(channels)
            if level != len(config.channel_mult) - 1:
                self.input_blocks.append(Stage([Downsample(channels)]))
                skips.append(channels)
                downsampling *= 2

        self.middle_block = Stage(
            [
                ResBlock(channels, channels, embedding, groups),
                SpatialTransformer(config, channels, downsampling),
                ResBlock(channels, channels, embedding, groups),
            ]
        )

        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                stage = blocks(channels + skips.pop(), multiplier * config.model_channels, downsampling)
                channels = multiplier * config.model_channels
                if level and i == config.num_res_blocks:
                    stage.append(Upsample(channels))
                    downsampling //= 2
                self.output_blocks.append(Stage(stage))

        self.out = nn.Sequential(
            GroupNorm(groups, channels, silu=True),
            nn.Identity(),  # a SiLU in the original, part of the norm here
            nn.Conv2d(channels, config.out_channels, 3, padding=1),
        )
        self.frequencies_device: torch.device | None = None  # see sd.models.layers.timestep_embedding
        self.quantisation = "none"  # see sd.optimise.approximate
        self.res_blocks = [module for module in self.modules() if isinstance(module, ResBlock)]
        self.transformers = [module for module in self.modules() if isinstance(module, SpatialTransformer)]
        self.time_channels = [block.out_channels for block in self.res_blocks]
        for i, block in enumerate(self.res_blocks):
            block.index = i
        for i, transformer in enumerate(self.transformers):
            transformer.index = i

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights, to which the inputs are cast."""
        convolution = self.out[2]
        assert isinstance(convolution, nn.Conv2d)
        return convolution.weight.dtype

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | ProjectedContext) -> Tensor:
        """Predict the noise (eps) or v.

        x [B, in_channels, h, w], h and w multiples of 2^(levels - 1); timesteps [B] or [1], of any number type, may be
        fractional, or a row of `time_table`; context [N, T, context_dim], or the result of `project_context`, where N is B or
        a multiple of it, such as 2 B for both halves of guidance: image i is then that of x[i % B], timesteps are [1], and what
        precedes the first attention to the context is computed once. Returns [N, out_channels, h, w] in the dtype of the
        computation.
        """
        with allowed_kernels(self.attention):
            return self.denoise(x, timesteps, context)

    def forward_with_features(
        self, x: Tensor, timesteps: Tensor, context: Tensor | ProjectedContext, deep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`denoise_with_features` in the kernel context."""
        with allowed_kernels(self.attention):
            return self.denoise_with_features(x, timesteps, context, deep)

    def denoise(self, x: Tensor, timesteps: Tensor, context: Tensor | ProjectedContext) -> Tensor:
        """`forward` without the kernel context; torch.compile replaces this method."""
        return self.denoise_with_features(x, timesteps, context)[0]

    def denoise_with_features(
        self, x: Tensor, timesteps: Tensor, context: Tensor | ProjectedContext, deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(output of `denoise`, deep features: the input of the last stage from the stage before it).

        deep: such features of an earlier call at a near timestep, which replace all stages between the first and the last
        (see sd.optimise.approximate).
        """
        times, contexts = self._times(timesteps), self._contexts(context)
        # Not by slices, new ModuleLists, which guards of compiled code check at every call.
        first_block, *input_blocks = self.input_blocks
        *output_blocks, last_block = self.output_blocks
        first = first_block(x.to(self.dtype), times, contexts)
        if deep is None:
            h, skips = first, []
            for stage in input_blocks:
                h = stage(h, times, contexts)
                skips.append(h)
            h = self.middle_block(h, times, contexts)
            for stage in output_blocks:
                h = stage(self._concatenate(h, skips.pop()), times, contexts)
            deep = h
        return self.out(last_block(self._concatenate(deep, first), times, contexts)), deep

    def _concatenate(self, h: Tensor, skip: Tensor) -> Tensor:
        """[N, C, H, W] and [N or B, C', H, W] -> [N, C + C', H, W]; nhwc: by views in NHWC, since inductor may write NCHW."""
        skip = repeated(skip, len(h))
        if not self.nhwc:
            return torch.cat([h, skip], dim=1)
        return torch.cat([h.permute(0, 2, 3, 1), skip.permute(0, 2, 3, 1)], dim=3).permute(0, 3, 1, 2)

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input, as in latent consistency models (arXiv 2310.04378, section 4.2)."""
        return self.config.guidance_embedding is not None

    def _times(self, timesteps: Tensor, guidance: float | None = None) -> Sequence[Tensor]:
        """Time projections [B or 1, C, 1, 1] of all ResBlocks: split from a row of the table, or computed."""
        if timesteps.dim() == 4:
            times: Sequence[Tensor] = timesteps.split(self.time_channels, dim=1)
            return times
        emb = timestep_embedding(timesteps, self.config.model_channels, self.frequencies_device)
        emb = emb.to(self.dtype)
        if guidance is not None:
            assert self.config.guidance_embedding is not None, "this UNet embeds no guidance scale"
            embedded = guidance_embedding(guidance, self.config.guidance_embedding).to(emb.device, emb.dtype)
            emb = emb + self.time_embedding["cond_proj"](embedded)
        emb = self.time_embed(emb)
        return [block.project_time(emb) for block in self.res_blocks]

    def _contexts(self, context: Tensor | ProjectedContext) -> BlockContexts:
        if isinstance(context, tuple):
            return context
        context = context.to(self.dtype)
        return [[context] * len(transformer.transformer_blocks) for transformer in self.transformers]

    def time_table(self, timesteps: Tensor, guidance: float | None = None) -> Tensor:
        """timesteps [N] -> [N, P, 1, 1]: the time projections of all ResBlocks, concatenated.

        `forward` accepts a row [1, P, 1, 1] in place of its timesteps. guidance: scale for a UNet that embeds it, which no
        other argument carries.
        """
        return torch.cat(list(self._times(timesteps, guidance)), dim=1)

    def project_context(self, context: Tensor) -> ProjectedContext:
        """context [B, T, context_dim] -> keys and values of all cross-attentions, each [B, T, H, D].

        `forward` accepts them in place of the context. Not for attention `mha`, which projects by itself.
        """
        context = context.to(self.dtype)
        return tuple(
            tuple(block.project_context(context) for block in _transformer_blocks(transformer))
            for transformer in self.transformers
        )

    def fuse_projections(self, self_attention: bool, cross_attention: bool) -> None:
        """Fuse the projections q, k, v of self-attention, and k, v of cross-attention, into one product; or separate them."""
        for block in self.transformer_blocks():
            if isinstance(block.attn1, CrossAttention):
                block.attn1.fuse("qkv" if self_attention else "")
            if isinstance(block.attn2, CrossAttention):
                block.attn2.fuse("kv" if cross_attention else "")

    def fold_projections(self, enabled: bool) -> None:
        """Fold the last feed-forward layer of each SpatialTransformer into its projection to the image, or undo it."""
        for transformer in self.transformers:
            transformer.fold(enabled)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """As of nn.Module; folded projections follow the new weights."""
        loaded = super().load_state_dict(*arguments, **options)
        if any(transformer.folded_weight is not None for transformer in self.transformers):
            self.fold_projections(True)
        return loaded

    def transformer_blocks(self) -> list[BasicTransformerBlock]:
        """All transformer blocks in execution order."""
        return _transformer_blocks(self)

    def head_dims(self) -> set[int]:
        """The head sizes that an attention backend must support."""
        return {block.attn1.head_dim for block in self.transformer_blocks()}

    def use_attention(self, attention: Attention) -> None:
        """Switch every attention to `attention` over the same weights, without a check that it can run here."""
        for block in self.transformer_blocks():
            block.use_attention(attention)
        self.attention = attention


def _transformer_blocks(module: nn.Module) -> list[BasicTransformerBlock]:
    return [block for block in module.modules() if isinstance(block, BasicTransformerBlock)]
