"""The text tower of CLIP (SD1) and OpenCLIP (SD2), one class for both. Module names are OpenCLIP's keys.

Architecture: CLIP (arXiv 2103.00020). SD1 uses the last of 12 layers and the sigmoid approximation of GELU; SD2 the
last but one of 24 layers, both after the final LayerNorm. SD1's key names are folded at load (sd.checkpoint.layouts).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sd.attention.functions import causal
from sd.config.presets import TextConfig


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of the original CLIP."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class SelfAttention(nn.Module):
    """Causal self-attention with the packed projection of nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)
        if not self.in_proj_weight.is_meta:
            nn.init.normal_(self.in_proj_weight, std=width**-0.5)
            nn.init.zeros_(self.in_proj_bias)

    def forward(self, x):  # [B, T, C]
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.out_proj(causal(q, k, v).flatten(2))


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, activation: nn.Module):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", activation)
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TextEncoder(nn.Module):
    """Tokens to the context of the UNet's cross-attention."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        width = config.width
        activation = nn.GELU() if config.kind == "openclip" else QuickGELU()
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, config.heads, activation) for _ in range(config.layers)
        )
        self.ln_final = nn.LayerNorm(width)
        if not self.positional_embedding.is_meta:
            nn.init.normal_(self.positional_embedding, std=0.01)
            nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, tokens):
        """tokens [B, 77] int64 -> [B, 77, width] in the dtype of the computation. Padding is attended to, as in training."""
        x = self.token_embedding(tokens) + self.positional_embedding
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_final(x)
