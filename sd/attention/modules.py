"""Attention modules: projections around an attention backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sd.attention.functions import Attention


class CrossAttention(nn.Module):
    """Attention with separate projections, as in the published checkpoints; self-attention when there is no context.

    `fused` is None, or the matrix of which the weights of q, k and v (self-attention) or k and v are views.
    """

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

    def forward(self, x, context=None):
        """x [B, S, C] -> [B, S, C]. context: None, [B, T, C'], or what `keys_values` made of it."""
        if context is None and self.fused is not None:
            q, k, v = F.linear(x, self.fused).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        else:
            q = self._split(self.to_q(x))
            k, v = context if isinstance(context, tuple) else self.keys_values(x if context is None else context)
        return self.to_out(self.attend(q, k, v).flatten(2))

    def keys_values(self, context):
        """context [B, T, C'] -> its keys and values, each [B, T, H, D]; they depend on nothing else."""
        if self.fused is not None:
            return F.linear(context, self.fused).unflatten(-1, (2, self.heads, self.head_dim)).unbind(2)
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def _split(self, x):
        return x.unflatten(-1, (self.heads, self.head_dim))

    def fuse(self, names: str) -> None:
        """Hold the weights of `names`, "qkv" or "kv", in one matrix, so that one product makes them; "" separates them.

        The separate weights become views of it: no second copy is kept, and keys and values of the weights stay.
        """
        linears = [getattr(self, f"to_{name}") for name in names]
        if not names:
            if self.fused is not None:
                for linear in (self.to_q, self.to_k, self.to_v):  # those that are views get memory of their own
                    linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
            self.fused = None
            return
        self.fused = torch.cat([linear.weight.detach() for linear in linears])
        for linear, weight in zip(linears, self.fused.chunk(len(names))):
            linear.weight = nn.Parameter(weight, requires_grad=False)


class NativeAttention(nn.Module):
    """The same attention by nn.MultiheadAttention, with the keys of the published experiment's native-MHA checkpoints.

    Weights of the original layout fold into it as they are loaded; q, k and v have no bias there, so in_proj_bias is zero.
    """

    def __init__(self, query_dim: int, context_dim: int, heads: int, head_dim: int, device=None, dtype=None):
        super().__init__()
        assert heads * head_dim == query_dim, "nn.MultiheadAttention has no inner width of its own"
        self.heads, self.head_dim = heads, head_dim
        self.mha = nn.MultiheadAttention(
            query_dim, heads, kdim=context_dim, vdim=context_dim, batch_first=True, device=device, dtype=dtype
        )
        nn.init.zeros_(self.mha.in_proj_bias)
        self._register_load_state_dict_pre_hook(self._fold)

    def forward(self, x, context=None):
        context = x if context is None else context
        return self.mha(x, context, context, need_weights=False)[0]

    @property
    def packed(self) -> bool:
        """Whether q, k and v are one matrix (self-attention) or three (cross-attention)."""
        return self.mha.in_proj_weight is not None

    def _fold(self, state_dict, prefix, *_):
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
    """nn.MultiheadAttention over the weights of `attention`: nothing is copied but q, k, v into one matrix, once."""
    q, k, v, out = attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]
    shape = (q.in_features, k.in_features, attention.heads, attention.head_dim)
    native = NativeAttention(*shape, device="meta", dtype=q.weight.dtype)
    mha = native.mha
    if native.packed:
        mha.in_proj_weight = nn.Parameter(torch.cat([q.weight, k.weight, v.weight]), requires_grad=False)
    else:
        mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight = q.weight, k.weight, v.weight
    mha.in_proj_bias = nn.Parameter(
        torch.zeros(3 * q.out_features, device=q.weight.device, dtype=q.weight.dtype), False
    )
    mha.out_proj.weight, mha.out_proj.bias = out.weight, out.bias
    return native.train(attention.training)


def to_separate(native: NativeAttention) -> CrossAttention:
    """The inverse of `to_native`: the projections become views of the module's weights."""
    mha = native.mha
    if native.packed:
        weights = [nn.Parameter(weight, requires_grad=False) for weight in mha.in_proj_weight.detach().chunk(3)]
    else:
        weights = [mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight]
    attention = CrossAttention(mha.embed_dim, mha.kdim, native.heads, native.head_dim)
    for linear, weight in zip((attention.to_q, attention.to_k, attention.to_v), weights):
        linear.weight = weight
    attention.to_out[0].weight, attention.to_out[0].bias = mha.out_proj.weight, mha.out_proj.bias
    return attention.train(native.training)
