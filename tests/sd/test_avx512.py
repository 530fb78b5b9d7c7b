"""The attention kernel for avx512_bf16: threads, compiled code, its cache, refusals, and the choice of `fast`."""

from __future__ import annotations

import stat
from dataclasses import replace

import pytest
import torch
from models import relative_error

from sd import Optimisations, StableDiffusion
from sd.attention import availability, avx512
from sd.attention.accuracy import bound, function_error
from sd.attention.availability import check, for_head_dim, unavailable_reason
from sd.attention.functions import Attention
from sd.errors import ConfigError, SDWarning, Unavailable
from sd.features import FEATURES, has
from sd.optimise.apply import require_available
from sd.optimise.presets import parse

CPU = torch.device("cpu")
KERNEL = Attention("sdpa", avx512=True)
REASON = avx512.unavailable_reason(CPU)
needs_kernel = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def tensors(queries: int, keys: int, head_dim: int = 64, heads: int = 3, batch: int = 2) -> list[torch.Tensor]:
    """q, k and v in bf16, of unit variance."""
    return [torch.randn(batch, tokens, heads, head_dim).bfloat16() for tokens in (queries, keys, keys)]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """No kernel is loaded or stored, and no reason known; the folder in which kernels will be stored."""

    def forget() -> None:
        for known in (avx512._kernel, avx512._cache_folder, availability._trial_failure):
            known.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path / "sd-perf"
    forget()


@needs_kernel
@pytest.mark.parametrize(
    "queries, keys, head_dim",
    [
        *((1, 1, 64), (48, 128, 64), (49, 129, 64), (300, 1000, 64), (1000, 1, 64), (17, 257, 64)),
        *((49, 129, 2), (50, 257, 40), (100, 300, 160), (60, 300, 512)),
    ],
)
def test_lengths_around_its_blocks(queries, keys, head_dim):
    torch.manual_seed(queries)
    assert function_error(KERNEL, *tensors(queries, keys, head_dim)) <= bound(KERNEL, torch.bfloat16)


@needs_kernel
def test_parts_of_a_fused_projection_of_several_blocks():
    q, k, v = torch.randn(2, 300, 3, 5, 40).bfloat16().unbind(2)
    assert not k.is_contiguous()
    assert function_error(KERNEL, q, k, v) <= bound(KERNEL, torch.bfloat16)


@needs_kernel
@pytest.mark.parametrize("score", [131072.0, 1e12, 1e30])
def test_large_scores_select_one_key(score):
    """Each query equals one key and is far from the others, in either of two blocks."""
    torch.manual_seed(0)
    signs, v = (torch.randint(0, 2, (2, 200, 3, 64)) * 2 - 1).float(), torch.randn(2, 200, 3, 64).bfloat16()
    q = (signs * (score / 8) ** 0.5).bfloat16()
    assert torch.equal(avx512.avx512_attention(q, q, v), v)
    assert avx512.avx512_attention(q, -q.flip(1), v).isfinite().all()


@needs_kernel
def test_a_block_of_larger_scores_takes_over():
    """The sums of earlier blocks are scaled down to nothing, and those of later ones count for nothing."""
    q, k, v = tensors(64, 600)
    for block in (slice(0, 40), slice(560, 600)):
        larger = k.clone()
        larger[:, block] *= 40
        assert function_error(KERNEL, q, larger, v) <= bound(KERNEL, torch.bfloat16)


@needs_kernel
def test_values_that_are_not_finite_stay_so():
    """In the result of its query, or of every query for a key or value; nowhere else."""
    for value in (float("nan"), float("inf")):
        for number, rows in enumerate((slice(7, 8), slice(0, 50), slice(0, 50))):
            inputs = tensors(50, 60)
            inputs[number][0, 7, 1] = value
            finite = avx512.avx512_attention(*inputs).isfinite()
            assert not finite[0, rows, 1].all(dim=-1).any()
            finite[0, rows, 1] = True
            assert finite.all()


@needs_kernel
def test_the_number_of_threads_changes_nothing():
    inputs, before = tensors(500, 300), torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outs.append(avx512.avx512_attention(*inputs))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@needs_kernel
def test_a_kernel_is_compiled_once_and_stored_for_this_user_alone(empty_cache, monkeypatch):
    inputs = tensors(20, 30)
    expected = avx512.avx512_attention(*inputs)
    assert len(list(empty_cache.iterdir())) == 1 and stat.S_IMODE(empty_cache.stat().st_mode) == 0o700
    avx512._kernel.cache_clear()
    with monkeypatch.context() as context:
        context.setattr(avx512.subprocess, "run", None)  # nothing is compiled again
        assert torch.equal(avx512.avx512_attention(*inputs), expected)


@needs_kernel
def test_a_damaged_kernel_is_compiled_again(empty_cache, monkeypatch, tmp_path):
    inputs = tensors(20, 30)
    expected = avx512.avx512_attention(*inputs)
    (file,) = empty_cache.iterdir()
    damaged = tmp_path / "other" / "sd-perf" / file.name  # elsewhere, since a loaded path is not read again
    damaged.parent.mkdir(mode=0o700, parents=True)
    damaged.write_bytes(file.read_bytes()[:100])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    for known in (avx512._kernel, avx512._cache_folder):
        known.cache_clear()
    assert torch.equal(avx512.avx512_attention(*inputs), expected)
    assert damaged.stat().st_size == file.stat().st_size


@needs_kernel
def test_a_folder_that_others_can_write_is_not_trusted(empty_cache):
    empty_cache.mkdir(mode=0o700)
    empty_cache.chmod(0o770)
    with pytest.warns(SDWarning, match="every process compiles it"):
        assert avx512._cache_folder() != empty_cache
    assert avx512._cache_folder().is_dir()


@needs_kernel
def test_a_home_that_cannot_be_written_is_no_error(empty_cache, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(SDWarning, match="name one in XDG_CACHE_HOME"):
        assert avx512.avx512_attention(*tensors(20, 30)).isfinite().all()
    assert avx512._cache_folder().is_dir() and tmp_path not in avx512._cache_folder().parents


@needs_kernel
def test_the_compilers_error_is_a_reason(empty_cache, monkeypatch, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho no such instruction >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(avx512, "cpp_compiler", lambda: str(compiler))
    with pytest.raises(Unavailable, match=r"cannot compile avx512\.cpp: no such instruction"):
        check(KERNEL, "cpu", torch.bfloat16, [64])
    with pytest.warns(SDWarning, match="fast is without avx512_attention: .* no such instruction"):
        assert not avx512.beats_sdpa()
    assert list(empty_cache.iterdir()) == []


@needs_kernel
@pytest.mark.slow
@pytest.mark.compile
def test_compiled_networks_call_it():
    """The latents of the embedded model are as near to those in fp32 as in bf16 with PyTorch's kernels."""
    latents = {}
    for name in ("bf16", "compile,avx512_attention"):
        model = StableDiffusion.tiny(optimisations=parse(name, "cpu"))
        for _ in range(2):  # the second is observed
            latents[name] = model.txt2img("a red star", steps=4, seed=1).latents
        assert model.kernels["unet"] == (("avx512",) if "avx512" in name else ("flash",))
        assert model.kernels["autoencoder"] == (("avx512",) if "avx512" in name else ("flash",))
    exact = StableDiffusion.tiny(optimisations=Optimisations()).txt2img("a red star", steps=4, seed=1).latents
    assert all(relative_error(ours, exact) <= 0.05 for ours in latents.values())


@needs_kernel
def test_other_inputs_are_refused():
    q, k, v = tensors(4, 5)
    for inputs in (tensors(4, 4, 7), tensors(4, 4, 514), (q.float(), k, v), (q, k.float(), v), (q, k, v.float())):
        with pytest.raises(NotImplementedError, match="bf16 with even head sizes of at most 512"):
            avx512.avx512_attention(*inputs)
    for inputs in ((q, k[:1], v[:1]), (q, k, v[:, 1:]), (q, k[:, :, 1:], v[:, :, 1:]), (q, k[:, :0], v[:, :0])):
        for call in (avx512.avx512_attention, torch.ops.sd.avx512_attention):
            with pytest.raises(ValueError, match="do not match"):
                call(*inputs)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        avx512.avx512_attention(q.requires_grad_(), k, v)
    assert "no support for training" in unavailable_reason(KERNEL, "cpu", torch.bfloat16, training=True)


@needs_kernel
def test_a_head_that_it_does_not_support_has_sdpa():
    assert for_head_dim(KERNEL, "cpu", torch.bfloat16, 514) == Attention("sdpa")
    assert for_head_dim(KERNEL, "cpu", torch.float32, 64) == Attention("sdpa")


def test_machines_that_cannot_run_it(monkeypatch):
    chosen = Optimisations(attention="sdpa", precision="bf16", avx512_attention=True)
    with pytest.raises(Unavailable, match="avx512_attention: the AVX-512 kernel runs on a CPU, and the device is meta"):
        require_available(chosen, torch.device("meta"))  # a GPU without bf16 would be refused for that
    monkeypatch.setitem(FEATURES, "avx512_attention", replace(FEATURES["avx512_attention"], available=True))
    monkeypatch.setattr(avx512, "processor_has", lambda name: True)
    monkeypatch.setattr(avx512.platform, "system", lambda: "Linux")
    monkeypatch.setattr(avx512, "cpp_compiler", lambda: None)
    assert "install g++" in avx512.unavailable_reason(CPU)
    monkeypatch.setattr(avx512, "cpp_compiler", lambda: "g++")
    assert avx512.unavailable_reason(CPU) is None
    monkeypatch.setattr(avx512.platform, "system", lambda: "Darwin")
    assert "Linux and a processor with avx512_bf16" in avx512.unavailable_reason(CPU)
    monkeypatch.setitem(FEATURES, "avx512_attention", replace(FEATURES["avx512_attention"], available=False))
    assert "torch >= 2.5" in avx512.unavailable_reason(CPU)


@pytest.mark.skipif(not has("packed"), reason="fast is fp32 here")
@pytest.mark.parametrize("amx", [False, True])
def test_fast_uses_it_in_bf16_without_amx(monkeypatch, amx):
    monkeypatch.setattr(avx512, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(avx512, "processor_has", lambda name: amx)
    monkeypatch.setattr(avx512, "_kernel", lambda head_dim: None)
    monkeypatch.setattr("sd.optimise.optimisations.cpp_compiler", lambda: "c++")
    monkeypatch.setattr("sd.optimise.optimisations.bf16_beats_fp32", lambda: True)
    assert parse("fast", "cpu").avx512_attention is not amx
    assert not parse("fast", "cpu", narrow=True).avx512_attention
    for changes in ({"attention": "original"}, {"sdpa_kernels": ("math",)}, {"precision": "full"}, {"aot": "x.pt2"}):
        assert not parse("fast", "cpu", {"compile": "none", **changes}).avx512_attention
    with pytest.raises(ConfigError, match="openvino: with avx512_attention is not offered"):
        parse("bf16,avx512_attention", "cpu", {"compile": "default", "compile_backend": "openvino"})
    openvino = parse("fast", "cpu", {"compile_backend": "openvino"})
    assert (openvino.precision, openvino.avx512_attention) == ("bf16", False)
