"""Every attention implementation and kernel against the original in float64, on fresh random inputs; and what is refused."""

from __future__ import annotations

import pytest
import torch
from agreement import DEVICES

from sd.attention.__main__ import main
from sd.attention.accuracy import DTYPES, HEAD_DIMS, SHAPES, bound, error, error_table, function_error
from sd.attention.availability import check, for_head_dim, why_not
from sd.attention.functions import CHOICES, Attention, allowed_kernels, original
from sd.errors import ConfigError, Unavailable
from sd.features import has

FUNCTIONS = [name for name in CHOICES if not name.startswith("mha")]


def not_usable(name, device, dtype, head_dim) -> str | None:
    if device == "cpu" and dtype == torch.float16 and not has("cpu_fp16"):
        return "this torch computes no fp16 on the CPU"
    return why_not(CHOICES[name], device, dtype, head_dim)


def skip_unless_usable(name, device, dtype, head_dim):
    reason = not_usable(name, device, dtype, head_dim)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("device", DEVICES)
def test_equals_the_original(seed, device, name, dtype, head_dim):
    skip_unless_usable(name, device, dtype, head_dim)
    choice = CHOICES[name]
    errors = {shape: error(choice, device, dtype, head_dim, shape, seed) for shape in SHAPES}
    assert all(one <= bound(choice, dtype) for one in errors.values()), errors


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_scores_beyond_fp16(seed, device, name, head_dim):
    """q.k of 131072, as SD 2.1 makes them: infinite in fp16, but q and k upcast, or a kernel of today, give the exact result.

    Each query is its own key and far from the others, so that the softmax picks one row of v.
    """
    skip_unless_usable(name, device, torch.float16, head_dim)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (2, 48, 3, head_dim), generator=generator) * 2 - 1
    q = (signs * (131072 / head_dim) ** 0.5).to(device, torch.float16)
    v = torch.randn(2, 48, 3, head_dim, generator=generator).to(device, torch.float16)
    assert not torch.isfinite(original(q, q, v, upcast=False)).all()
    with allowed_kernels(CHOICES[name]):
        out = CHOICES[name].function()(q, q, v)
    assert (out - v).abs().max() <= torch.finfo(torch.float16).eps * v.abs().max()


def test_a_wrong_result_is_beyond_the_bounds(seed):
    """The comparison can fail: with scores twice as large, or in half precision under the name of fp32, it does."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 64, 2, 64, generator=generator) for _ in range(3))
    assert function_error(Attention("original"), q, k, v) <= 1e-5
    expected = original(q.double(), k.double(), v.double())
    for wrong in (original(2 * q, k, v), original(q.bfloat16(), k.bfloat16(), v.bfloat16())):
        assert (wrong.double() - expected).abs().max() > 1e-5 * v.abs().max()


def test_the_error_table_covers_what_is_usable():
    lines = error_table("cpu", seed=3, head_dims=(32, 40))
    rows = {tuple(line.split()[:3]): line.split()[3:] for line in lines[1:]}
    assert all(len(cells) == 2 for cells in rows.values())
    assert float(rows["original", "-", "float32"][0]) <= 1e-5
    for name, choice in CHOICES.items():
        usable = why_not(choice, "cpu", torch.float32, 32) is None
        implementation, _, kernel = name.partition("-")
        kernel = kernel or ("any" if implementation in ("mha", "sdpa") else "-")
        assert ((implementation, kernel, "float32") in rows) == usable


def test_command_line(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"torch {torch.__version__}, CPU")
    assert lines[1].split() == ["original", "-", "usable"]
    assert sum(line.startswith("  mha") for line in lines) == 5 * (1 + torch.cuda.is_available())


def test_xformers_refusal_is_one_short_line():
    pytest.importorskip("xformers.ops", reason="xformers is not installed", exc_type=ImportError)
    reason = why_not(Attention("xformers"), "cpu", torch.float32, 64)
    assert reason and "\n" not in reason and len(reason) < 250
    assert "device=cpu" in reason


@pytest.mark.parametrize(
    "wrong", [{"implementation": "flash3"}, {"kernels": ("fast",)}, {"kernels": ()}, {"precision": "fp8"}]
)
def test_unknown_names(wrong):
    with pytest.raises(ConfigError):
        Attention(**wrong)


def test_a_refusal_says_why_and_what_there_is():
    with pytest.raises(Unavailable, match="Available here: original"):
        check(Attention("sdpa", ("cudnn",)), "cpu", torch.float32, [64])


def test_no_cuda_is_a_reason():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert why_not(Attention("original"), "cuda") == "there is no CUDA device here"


def test_the_vae_takes_the_nearest_that_can_run():
    """512 wide, one head: old xFormers and the fused kernels of a GPU refuse it, and the outcome is readable."""
    for choice in CHOICES.values():
        taken = for_head_dim(choice, "cpu", torch.float32, 512)
        assert why_not(taken, "cpu", torch.float32, 512) is None
        if why_not(choice, "cpu", torch.float32, 512) is None:
            assert taken == choice
