"""The text towers of CLIP (SD1) and OpenCLIP (SD2) in one class. Module names are OpenCLIP's keys.

Architecture: CLIP (arXiv 2103.00020). SD1 uses the last of 12 layers and the sigmoid approximation of GELU; SD2 uses the
penultimate of 24 layers; both apply the final LayerNorm. Loading renames SD1's keys (sd.checkpoint.layouts).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.attention.functions import causal
from sd.config.presets import TextConfig


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of the original CLIP."""

    def forward(self, x: Tensor) -> Tensor:
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

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C]
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1)).unbind(2)
        out: Tensor = self.out_proj(causal(q, k, v).flatten(2))
        return out


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, activation: nn.Module):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        c_fc, c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=activation, c_proj=c_proj))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C]
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class TextEncoder(nn.Module):
    """Tokens to the context of the UNet's cross-attention.

    added: None, or vectors [n, width] of textual-inversion embeddings, for token ids from vocab_size on.
    """

    added: Tensor | None

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        width = config.width
        activation = nn.GELU() if config.kind == "openclip" else QuickGELU()
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        blocks = (ResidualAttentionBlock(width, config.heads, activation) for _ in range(config.layers))
        self.transformer = nn.Sequential(OrderedDict(resblocks=nn.Sequential(*blocks)))
        self.ln_final = nn.LayerNorm(width)
        self.register_buffer("added", None, persistent=False)  # no key of the checkpoint
        if not self.positional_embedding.is_meta:
            nn.init.normal_(self.positional_embedding, std=0.01)
            nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, 77] int64 -> [B, 77, width] in the dtype of the computation. Padding is attended to, as in training."""
        x = self._embed(tokens) + self.positional_embedding
        out: Tensor = self.ln_final(self.transformer(x))
        return out

    def _embed(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, C]
        if self.added is None:
            vectors: Tensor = self.token_embedding(tokens)
            return vectors
        size = self.config.vocab_size
        learned = F.embedding((tokens - size).clamp(min=0), self.added)
        return torch.where((tokens >= size)[..., None], learned, self.token_embedding(tokens.clamp(max=size - 1)))
