"""How far every attention implementation and kernel is from `original` in float64 on the same inputs.

The numbers of `python -m sd.attention --errors`; the tests hold them to `bound`. An error is the largest absolute
difference over the largest absolute value of v, the scale of the result, which is a mean of rows of v; for `mha`, which
holds projections too, over the largest absolute value of the exact result.
"""

from __future__ import annotations

import copy

import torch

from sd.attention.availability import described, why_not
from sd.attention.functions import CHOICES, Attention, allowed_kernels, original
from sd.attention.modules import CrossAttention, to_native
from sd.features import has

# SD1's UNet: 40, 80, 160; SD2's: 64; the VAE: 512; 32 is the largest that old releases of xFormers take on a CPU.
HEAD_DIMS = (32, 40, 64, 80, 160, 512)
# (queries, keys): self-attention, the prompt's 77 keys, lengths that fill no tile of a kernel.
SHAPES = {"self": (64, 64), "cross": (64, 77), "odd": (37, 37), "odd-cross": (63, 77)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = 2


def bound(choice: Attention, dtype: torch.dtype) -> float:
    """Largest error that `choice` may have on inputs of unit variance.

    fp32: 1e-5, since a sum of at most 1024 terms of unit variance is wrong by some 1e-6. Half types, whose eps / 2 is the
    error of one rounding: softmax weights and result are rounded once each, together eps; as much again for kernels that
    also round the scaled q and k and the scores (PyTorch's `math` before 2.5). `mha` rounds four projections as well.
    """
    if dtype == torch.float32:
        return 1e-5
    return torch.finfo(dtype).eps * (4 if choice.implementation == "mha" else 2)


def function_error(choice: Attention, q, k, v) -> float:
    """Error of the attention function of `choice` on q [B, S, H, D], k and v [B, T, H, D]; NaN if the result has any."""
    expected = original(q.double(), k.double(), v.double(), upcast=False)
    with torch.no_grad(), allowed_kernels(choice):
        out = choice.function()(q, k, v)
    assert out.dtype == v.dtype and out.shape == expected.shape
    return ((out.double() - expected).abs().max() / v.double().abs().max()).item()


def module_error(choice: Attention, attention: CrossAttention, x, context=None) -> float:
    """Error of nn.MultiheadAttention over the weights of `attention` on x [B, S, C] and context [B, T, C'], if any."""
    exact = copy.deepcopy(attention).double()
    exact.attend = Attention("original", precision="input").function()
    with torch.no_grad():
        expected = exact(x.double(), None if context is None else context.double())
        with allowed_kernels(choice):
            out = to_native(attention)(x, context)
    assert out.dtype == x.dtype and out.shape == expected.shape
    return ((out.double() - expected).abs().max() / expected.abs().max()).item()


def error(choice: Attention, device, dtype: torch.dtype, head_dim: int, shape: str, seed: int) -> float:
    """Error of `choice` on normal random inputs, batch 2 and HEADS heads, of one of SHAPES."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(device, dtype)

    queries, keys = SHAPES[shape]
    if choice.implementation != "mha":
        q, k, v = (normal(2, tokens, HEADS, head_dim) for tokens in (queries, keys, keys))
        return function_error(choice, q, k, v)
    width = HEADS * head_dim
    context_width = width if shape in ("self", "odd") else width + 24  # the prompt has a width of its own
    attention = CrossAttention(width, context_width, HEADS, head_dim).to(device, dtype).eval().requires_grad_(False)
    for linear in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
        linear.weight.copy_(normal(*linear.weight.shape) * linear.in_features**-0.5)  # keeps unit variance
    context = None if shape in ("self", "odd") else normal(2, keys, context_width)
    return module_error(choice, attention, normal(2, queries, width), context)


def error_table(device, seed: int, head_dims=HEAD_DIMS) -> list[str]:
    """Lines: the worst error over SHAPES by implementation, kernel, dtype and head size; `-` where it cannot run."""
    lines = [f"  {'':<9} {'kernel':<14} {'dtype':<9}" + "".join(f"{head_dim:>9}" for head_dim in head_dims)]
    for choice in CHOICES.values():
        for dtype in DTYPES:
            if dtype == torch.float16 and torch.device(device).type == "cpu" and not has("cpu_fp16"):
                continue
            cells = []
            for head_dim in head_dims:
                if why_not(choice, device, dtype, head_dim):
                    cells.append("-")
                else:
                    errors = [error(choice, device, dtype, head_dim, shape, seed) for shape in SHAPES]
                    cells.append(f"{torch.tensor(errors).max():.1e}")  # of torch: it keeps NaN
            if set(cells) != {"-"}:
                implementation, kernel = described(choice)
                lines.append(
                    f"  {implementation:<9} {kernel:<14} {str(dtype)[6:]:<9}" + "".join(f"{c:>9}" for c in cells)
                )
    return lines
