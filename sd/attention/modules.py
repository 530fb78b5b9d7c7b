"""Attention modules: projections around an attention backend."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.attention.functions import Attention

KeysValues = tuple[Tensor, Tensor]  # each [B, T, H, D]
# Keys and values of the prompt for all cross-attentions of a UNet: by SpatialTransformer, then by block.
ProjectedContext = tuple[tuple[KeysValues, ...], ...]


class CrossAttention(nn.Module):
    """Attention with separate projections, as in the published checkpoints; self-attention without a context.

    fused: None, or the matrix whose views are the weights of q, k and v (self-attention) or of k and v.
    """

    fused: Tensor | None

    def __init__(self, query_dim: int, context_dim: int, heads: int, head_dim: int):
        super().__init__()
        inner = heads * head_dim
        self.heads, self.head_dim = heads, head_dim
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim))
        self.register_buffer("fused", None, persistent=False)  # no key of the checkpoint
        self.attend = Attention().function()

    def forward(self, x: Tensor, context: Tensor | KeysValues | None = None) -> Tensor:
        """x [B, S, C] -> [B, S, C]. context: None, [B, T, C'], or the result of `keys_values`."""
        if context is None and self.fused is not None:
            q, k, v = F.linear(x, self.fused).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        else:
            q = self._split(self.to_q(x))
            k, v = context if isinstance(context, tuple) else self.keys_values(x if context is None else context)
        out: Tensor = self.to_out(self.attend(q, k, v).flatten(2))
        return out

    def keys_values(self, context: Tensor) -> KeysValues:
        """Keys and values [B, T, H, D] of the context [B, T, C'], which no other input changes."""
        if self.fused is not None:
            k, v = F.linear(context, self.fused).unflatten(-1, (2, self.heads, self.head_dim)).unbind(2)
            return k, v
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def _split(self, x: Tensor) -> Tensor:  # [B, T, H*D] -> [B, T, H, D]
        heads: Tensor = x.unflatten(-1, (self.heads, self.head_dim))
        return heads

    def fuse(self, names: str) -> None:
        """Join the weights of `names`, "qkv" or "kv", in one matrix for one product; "" separates them again.

        The separate weights become views of the matrix: no second copy remains, and the state dict keeps its keys.
        """
        linears = [getattr(self, f"to_{name}") for name in names]
        if not names:
            if self.fused is not None:
                for linear in (self.to_q, self.to_k, self.to_v):  # copied, since some are views
                    linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
            self.fused = None
            return
        self.fused = torch.cat([linear.weight.detach() for linear in linears])
        for linear, weight in zip(linears, self.fused.chunk(len(names))):
            linear.weight = nn.Parameter(weight, requires_grad=False)


class NativeAttention(nn.Module):
    """The same attention by nn.MultiheadAttention, with the keys of the published experiment's native-MHA checkpoints.

    Loading folds weights of the original layout into it; q, k and v have no bias there, so in_proj_bias is zero.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int,
        heads: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        assert heads * head_dim == query_dim, "nn.MultiheadAttention requires heads * head_dim == query_dim"
        self.heads, self.head_dim = heads, head_dim
        self.mha = nn.MultiheadAttention(
            query_dim, heads, kdim=context_dim, vdim=context_dim, batch_first=True, device=device, dtype=dtype
        )
        nn.init.zeros_(self.mha.in_proj_bias)
        self._register_load_state_dict_pre_hook(self._fold)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [B, S, C], context [B, T, C'] or None for self-attention -> [B, S, C]."""
        context = x if context is None else context
        out: Tensor = self.mha(x, context, context, need_weights=False)[0]
        return out

    @property
    def packed(self) -> bool:
        """Whether q, k and v share one matrix (self-attention) or have three (cross-attention)."""
        return self.mha.in_proj_weight is not None

    def _fold(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        names = [f"{prefix}to_{x}.weight" for x in "qkv"]
        if names[0] in state_dict:
            q, k, v = (state_dict.pop(name) for name in names)
            if self.packed:
                state_dict[f"{prefix}mha.in_proj_weight"] = torch.cat([q, k, v])
            else:
                for name, weight in zip("qkv", (q, k, v)):
                    state_dict[f"{prefix}mha.{name}_proj_weight"] = weight
            for name in ("weight", "bias"):
                state_dict[f"{prefix}mha.out_proj.{name}"] = state_dict.pop(f"{prefix}to_out.0.{name}")
        # The published converter writes no in_proj_bias.
        state_dict.setdefault(f"{prefix}mha.in_proj_bias", torch.zeros_like(self.mha.in_proj_bias))


def to_native(attention: CrossAttention) -> NativeAttention:
    """nn.MultiheadAttention with the weights of `attention`, shared except for q, k, v of self-attention, joined once."""
    q, k, v, out = attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]
    native = NativeAttention(
        q.in_features, k.in_features, attention.heads, attention.head_dim, device="meta", dtype=q.weight.dtype
    )
    mha: Any = native.mha  # its annotations do not allow weights of another module
    if native.packed:
        mha.in_proj_weight = nn.Parameter(torch.cat([q.weight, k.weight, v.weight]), requires_grad=False)
    else:
        mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight = q.weight, k.weight, v.weight
    mha.in_proj_bias = nn.Parameter(q.weight.new_zeros(3 * q.out_features), requires_grad=False)
    mha.out_proj.weight, mha.out_proj.bias = out.weight, out.bias
    return native.train(attention.training)


def to_separate(native: NativeAttention) -> CrossAttention:
    """The inverse of `to_native`: the projections become views of the module's weights."""
    mha: Any = native.mha
    if native.packed:
        weights = [nn.Parameter(weight, requires_grad=False) for weight in mha.in_proj_weight.detach().chunk(3)]
    else:
        weights = [mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight]
    attention = CrossAttention(mha.embed_dim, mha.kdim, native.heads, native.head_dim)
    for linear, weight in zip((attention.to_q, attention.to_k, attention.to_v), weights):
        linear.weight = weight
    out: Any = attention.to_out[0]
    out.weight, out.bias = mha.out_proj.weight, mha.out_proj.bias
    return attention.train(native.training)
