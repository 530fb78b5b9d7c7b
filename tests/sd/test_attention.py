"""Attention backends and kernels against the original in float64 on random inputs; unavailable backends."""

from __future__ import annotations

import pytest
import torch
from agreement import DEVICES

from sd.attention.__main__ import main
from sd.attention.accuracy import DTYPES, SHAPES, bound, error, error_table, function_error
from sd.attention.availability import HEAD_DIMS, check, for_head_dim, unavailable_reason
from sd.attention.functions import CHOICES, Attention, allowed_kernels, original
from sd.errors import ConfigError, Unavailable
from sd.features import has
from sd.kernels import OWN_ATTENTION

FUNCTIONS = [name for name in CHOICES if not name.startswith("mha")]


def skip_reason(name, device, dtype, head_dim) -> str | None:
    if device == "cpu" and dtype == torch.float16 and not has("cpu_fp16"):
        return "this torch has no fp16 on the CPU"
    return unavailable_reason(CHOICES[name], device, dtype, head_dim)


def skip_unless_usable(name, device, dtype, head_dim):
    reason = skip_reason(name, device, dtype, head_dim)
    if reason:
        pytest.skip(reason)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("device", DEVICES)
def test_error_is_within_bound(seed, device, name, dtype, head_dim):
    skip_unless_usable(name, device, dtype, head_dim)
    choice = CHOICES[name]
    errors = {shape: error(choice, device, dtype, head_dim, shape, seed) for shape in SHAPES}
    assert all(value <= bound(choice, dtype) for value in errors.values()), errors


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_scores_beyond_fp16(seed, device, name, head_dim):
    """Scores of 131072, as in SD 2.1, overflow fp16: with q and k upcast, or fp32 accumulation, the result is exact.

    Each query equals its own key and is far from the others, so that the softmax selects one row of v.
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


def test_wrong_results_exceed_the_bound(seed):
    """Scores twice as large, and half precision in place of fp32, fail the comparison."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 64, 2, 64, generator=generator) for _ in range(3))
    assert function_error(Attention("original"), q, k, v) <= 1e-5
    expected = original(q.double(), k.double(), v.double())
    for wrong in (original(2 * q, k, v), original(q.bfloat16(), k.bfloat16(), v.bfloat16())):
        assert (wrong.double() - expected).abs().max() > 1e-5 * v.abs().max()


def test_error_table_lists_the_usable_backends():
    lines = error_table("cpu", seed=3, head_dims=(32, 40))
    rows = {tuple(line.split()[:3]): line.split()[3:] for line in lines[1:]}
    assert all(len(cells) == 2 for cells in rows.values())
    assert float(rows["original", "-", "float32"][0]) <= 1e-5
    for name, choice in CHOICES.items():
        usable = unavailable_reason(choice, "cpu", torch.float32, 32) is None
        implementation, _, kernel = name.partition("-")
        kernel = kernel or ("any" if implementation in ("mha", "sdpa") else "-")
        kernel += "-float32" if kernel in OWN_ATTENTION else ""
        assert ((implementation, kernel, "float32") in rows) == usable


def test_command_line(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"torch {torch.__version__}, CPU")
    assert lines[1].split() == ["original", "-", "usable"]
    assert sum(line.startswith("  mha") for line in lines) == 5 * (1 + torch.cuda.is_available())


def test_xformers_reason_is_one_short_line():
    pytest.importorskip("xformers.ops", reason="xformers is not installed", exc_type=ImportError)
    reason = unavailable_reason(Attention("xformers"), "cpu", torch.float32, 64)
    assert reason and "\n" not in reason and len(reason) < 250
    assert "device=cpu" in reason


@pytest.mark.parametrize(
    "wrong", [{"implementation": "flash3"}, {"kernels": ("fast",)}, {"kernels": ()}, {"precision": "fp8"}]
)
def test_unknown_names_raise(wrong):
    with pytest.raises(ConfigError):
        Attention(**wrong)


def test_unavailable_backend_lists_the_available_ones():
    with pytest.raises(Unavailable, match="Available here: original"):
        check(Attention("sdpa", ("cudnn",)), "cpu", torch.float32, [64])


def test_missing_cuda_is_a_reason():
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is available")
    assert unavailable_reason(Attention("original"), "cuda") == "no CUDA device is available"


def test_vae_falls_back_to_a_usable_backend():
    """A head of 512, which old xFormers and the fused GPU kernels do not support."""
    for choice in CHOICES.values():
        selected = for_head_dim(choice, "cpu", torch.float32, 512)
        assert unavailable_reason(selected, "cpu", torch.float32, 512) is None
        if unavailable_reason(choice, "cpu", torch.float32, 512) is None:
            assert selected == choice
