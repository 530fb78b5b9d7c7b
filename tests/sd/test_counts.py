"""Operators, bytes, copies and host waits of a UNet call by technique, for the embedded UNet and one of 34 M."""

from __future__ import annotations

import count_techniques
import pytest
import torch
from count_techniques import ROWS, Case
from counting import needs_counting, needs_fused_attention
from models import relative_error

from perf.launch.process import ROOT
from perf.test_peers import CASES

pytestmark = needs_counting
ALL = ROWS["all of them"]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(request.param)


def _products(counting):
    return sum(counting.ops[name] for name in ("mm", "addmm", "bmm", "baddbmm"))


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_results_are_unchanged(case, row):
    reference = case.call(attention="original")
    assert relative_error(case.call(**ROWS[row]), reference) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, saved",
    [
        ("fused_qkv", lambda blocks, res_blocks: 2 * blocks),  # one product instead of three
        ("fused_kv", lambda blocks, res_blocks: blocks),
        ("cache_context_kv", lambda blocks, res_blocks: 2 * blocks),
        ("cache_time_embeddings", lambda blocks, res_blocks: 2 + res_blocks),
    ],
)
def test_products_saved(case, name, saved):
    plain, counting = case.count(), case.count(**{name: True})
    expected = saved(len(case.unet.transformer_blocks()), len(case.unet.res_blocks))
    assert _products(plain) - _products(counting) == expected
    assert plain.total - counting.total >= expected
    assert counting.bytes < plain.bytes


def test_cached_time_embeddings_create_no_table(case):
    assert case.count().made == 1  # the frequencies
    assert case.count(cache_time_embeddings=True).made == 0


@needs_fused_attention
def test_all_techniques_save_a_fifth_of_the_operators(case):
    plain, combined = case.count(), case.count(**ALL)
    assert combined.total <= 0.8 * plain.total
    assert combined.bytes <= 0.92 * plain.bytes


@needs_fused_attention
def test_original_moves_more(case):
    assert case.count(**ROWS["original"]).bytes > 1.2 * case.count().bytes


@needs_fused_attention
@pytest.mark.parametrize("fields", [{"channels_last": True}, ALL])
def test_channels_last_copies_no_layout(case, fields):
    """Convolutions have NHWC inputs and weights, linear layers contiguous inputs, and no tensor is copied."""
    counting = case.count(**fields)
    assert counting.copies == 0
    convolutions = [arguments for op, arguments, _ in counting.calls if op == "convolution"]
    assert len(convolutions) > 20
    for x, weight, *_ in convolutions:
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert weight.is_contiguous(memory_format=torch.channels_last)
    linears = [arguments for op, arguments, _ in counting.calls if op in ("mm", "addmm")]
    assert all(argument.is_contiguous() for arguments in linears for argument in arguments[-2:-1])


@needs_fused_attention
@pytest.mark.parametrize("row", ROWS)
def test_no_call_synchronises(case, row):
    assert case.count(**ROWS[row]).host_waits == 0


@pytest.mark.slow
@pytest.mark.skipif(not torch.__version__.startswith("2.15."), reason="the docs have counts for torch 2.15")
def test_the_docs_have_this_table():
    text = (ROOT / "docs" / "optimisations.md").read_text(encoding="utf-8")
    assert "\n".join(count_techniques.table()) in text, "run: python tests/helpers/count_techniques.py"
