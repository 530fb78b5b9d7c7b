"""Errors of the attention backends against `original` in float64 on the same inputs, and their bounds.

`python -m sd.attention --errors` prints them; the tests assert `bound`. An error is the largest absolute difference
divided by the largest absolute value of v, since a result is a weighted mean of rows of v; for `mha`, which includes the
projections, divided by the largest absolute value of the exact result.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sd.attention.availability import HEAD_DIMS, labels, unavailable_reason
from sd.attention.functions import CHOICES, Attention, allowed_kernels, original
from sd.attention.modules import CrossAttention, to_native
from sd.features import has

# (queries, keys): self-attention, the 77 tokens of a prompt, and lengths that are no multiple of a kernel's tile.
SHAPES = {"self": (64, 64), "cross": (64, 77), "odd": (37, 37), "odd-cross": (63, 77)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = 2


def bound(choice: Attention, dtype: torch.dtype) -> float:
    """Largest permitted error of `choice` on inputs of unit variance.

    fp32: 1e-5, ten times the rounding error of a sum of 1024 terms of unit variance. Half types: softmax weights and
    result are rounded once each, eps / 2 per rounding; twice that for kernels that also round the scaled q and k and the
    scores (PyTorch's `math` before 2.5), and 8 eps before 2.2, where a CPU has no other kernel: there the rounding of a
    score of 6 alone changes its weight by 2 eps. `mha` rounds four projections as well.
    """
    if dtype == torch.float32:
        return 1e-5
    factor = {"mha": 4, "sdpa": 2 if has("cpu_flash") else 8}.get(choice.implementation, 2)
    return torch.finfo(dtype).eps * factor


def function_error(choice: Attention, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Error of the attention function on q [B, S, H, D] and k, v [B, T, H, D]; NaN if the result has any."""
    expected = original(q.double(), k.double(), v.double(), upcast=False)
    with torch.no_grad(), allowed_kernels(choice):
        out = choice.function()(q, k, v)
    assert out.dtype == v.dtype and out.shape == expected.shape
    return float((out.double() - expected).abs().max() / v.double().abs().max())


def module_error(choice: Attention, attention: CrossAttention, x: Tensor, context: Tensor | None = None) -> float:
    """Error of nn.MultiheadAttention with the weights of `attention`, on x [B, S, C] and context [B, T, C'] or None."""
    exact = copy.deepcopy(attention).double()
    exact.attend = Attention("original", precision="input").function()
    with torch.no_grad():
        expected = exact(x.double(), None if context is None else context.double())
        with allowed_kernels(choice):
            out = to_native(attention)(x, context)
    assert out.dtype == x.dtype and out.shape == expected.shape
    return float((out.double() - expected).abs().max() / expected.abs().max())


def error(
    choice: Attention, device: torch.device | str, dtype: torch.dtype, head_dim: int, shape: str, seed: int
) -> float:
    """Error of `choice` on normal random inputs of batch 2, HEADS heads and a shape of SHAPES."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    queries, keys = SHAPES[shape]
    if choice.implementation != "mha":
        q, k, v = (normal(2, tokens, HEADS, head_dim) for tokens in (queries, keys, keys))
        return function_error(choice, q, k, v)
    width = HEADS * head_dim
    cross = shape in ("cross", "odd-cross")
    context_width = width + 24 if cross else width
    attention = CrossAttention(width, context_width, HEADS, head_dim).to(device, dtype).eval().requires_grad_(False)
    for module in attention.modules():
        if isinstance(module, nn.Linear):  # scaled so that the projections keep unit variance
            module.weight.copy_(normal(*module.weight.shape) * module.in_features**-0.5)
    context = normal(2, keys, context_width) if cross else None
    return module_error(choice, attention, normal(2, queries, width), context)


def error_table(device: torch.device | str, seed: int, head_dims: Sequence[int] = HEAD_DIMS) -> list[str]:
    """Lines of the largest error over SHAPES by implementation, kernel, dtype and head size; `-` where it cannot run."""
    lines = [f"  {'':<9} {'kernel':<14} {'dtype':<9}" + "".join(f"{head_dim:>9}" for head_dim in head_dims)]
    for choice in CHOICES.values():
        for dtype in DTYPES:
            if dtype == torch.float16 and torch.device(device).type == "cpu" and not has("cpu_fp16"):
                continue
            cells = []
            for head_dim in head_dims:
                if unavailable_reason(choice, device, dtype, head_dim):
                    cells.append("-")
                else:
                    errors = [error(choice, device, dtype, head_dim, shape, seed) for shape in SHAPES]
                    cells.append(f"{torch.tensor(errors).max():.1e}")  # torch's max propagates NaN
            if set(cells) != {"-"}:
                implementation, kernel = labels(choice)
                label = f"  {implementation:<9} {kernel:<14} {str(dtype)[6:]:<9}"
                lines.append(label + "".join(f"{cell:>9}" for cell in cells))
    return lines
