"""Attention functions on arbitrary shapes and memory layouts, against the original in float64."""

from __future__ import annotations

import pytest
import torch
from agreement import DEVICES

pytest.importorskip("hypothesis")  # a GPU machine may lack it and still runs the other tests
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_attention import FUNCTIONS, skip_reason

from sd.attention.accuracy import DTYPES, bound, function_error
from sd.attention.functions import ALIGNMENT, CHOICES, _dense_heads

# Memory layouts of [B, S, H, D]: functions of a random generator and the sizes.
LAYOUTS = {
    "contiguous": lambda normal, b, s, h, d: normal(b, s, h, d),
    "heads first": lambda normal, b, s, h, d: normal(b, h, s, d).transpose(1, 2),
    "tokens first": lambda normal, b, s, h, d: normal(s, b, h, d).transpose(0, 1),
    "channels first, as in the VAE": lambda normal, b, s, h, d: normal(b, h, d, s).permute(0, 3, 1, 2),
    "part of a packed projection": lambda normal, b, s, h, d: normal(b, s, 3, h, d)[:, :, 1],
    "every other token": lambda normal, b, s, h, d: normal(b, 2 * s, h, d)[:, ::2],
    "expanded over the batch": lambda normal, b, s, h, d: normal(1, s, h, d).expand(b, s, h, d),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=40)
@given(
    data=st.data(),
    batch=st.integers(1, 9),
    queries=st.integers(1, 70),
    keys=st.integers(1, 90),
    heads=st.integers(1, 5),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_layout(device, name, data, batch, queries, keys, heads, layouts, seed):
    cases = [(dtype, head_dim) for dtype in DTYPES for head_dim in range(8, 97, 8)]
    usable = [case for case in cases if not skip_reason(name, device, *case)]
    if not usable:
        pytest.skip(skip_reason(name, device, *cases[0]))
    assume(not (name == "sdpa-cudnn" and keys == 1))  # which cuDNN does not support
    dtype, head_dim = data.draw(st.sampled_from(usable))
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(device, dtype)

    q, k, v = (
        LAYOUTS[layout](normal, batch, tokens, heads, head_dim)
        for layout, tokens in zip(layouts, (queries, keys, keys))
    )
    assert function_error(CHOICES[name], q, k, v) <= bound(CHOICES[name], dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_strides_are_those_that_the_kernels_of_a_gpu_require(layout, tokens, batch):
    """An H200 refused `mem_efficient` for a single token that came from a convolution."""
    x = LAYOUTS[layout](torch.rand, batch, tokens, 3, 16)
    dense = _dense_heads(x)
    assert dense.stride(-1) == 1 and all(stride % ALIGNMENT == 0 for stride in dense.stride()[:-1])
    assert torch.equal(dense, x)
    assert (dense is x) is (layout != "channels first, as in the VAE")


def test_a_head_size_that_no_copy_could_align_is_not_copied():
    x = torch.rand(2, 3, 3, 4)
    assert _dense_heads(x) is x
