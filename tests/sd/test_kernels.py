"""The attention kernels of our own: lengths, threads, compiled code, its cache, refusals, and the choice of `fast`."""

from __future__ import annotations

import ctypes
import os
import stat
from dataclasses import replace

import pytest
import torch
from models import relative_error

from sd import Optimisations, StableDiffusion
from sd.attention import availability
from sd.attention.accuracy import bound, function_error
from sd.attention.availability import check, for_head_dim, unavailable_reason
from sd.attention.functions import Attention
from sd.choices import cpp_compiler
from sd.errors import ConfigError, SDWarning, Unavailable
from sd.features import FEATURES, PROBE_CALLS, has
from sd.kernels import OWN_ATTENTION, avx2, avx512, build
from sd.optimise import avx2_layers
from sd.optimise.apply import require_available
from sd.optimise.optimisations import OWN_KERNELS
from sd.optimise.presets import parse

CPU = torch.device("cpu")
REASONS = {name: module.unavailable_reason(CPU) for name, module in OWN_ATTENTION.items()}
SKIPPED = {name: pytest.mark.skipif(REASONS[name] is not None, reason=str(REASONS[name])) for name in REASONS}
each_kernel = pytest.mark.parametrize("name", [pytest.param(name, marks=SKIPPED[name]) for name in OWN_ATTENTION])
needs_avx512 = SKIPPED["avx512"]
needs_compiler = pytest.mark.skipif(os.name != "posix" or cpp_compiler() is None, reason="no C++ compiler")


def tensors(
    name: str, queries: int, keys: int, head_dim: int = 64, heads: int = 3, batch: int = 2
) -> list[torch.Tensor]:
    """q, k and v in the kernel's dtype, of unit variance."""
    shapes = ((batch, tokens, heads, head_dim) for tokens in (queries, keys, keys))
    return [torch.randn(shape).to(OWN_ATTENTION[name].DTYPE) for shape in shapes]


def error(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Error over its bound: at most 1 is right."""
    kernel = Attention("sdpa", own=name)
    return function_error(kernel, q, k, v) / bound(kernel, OWN_ATTENTION[name].DTYPE)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """No kernel is loaded or stored, and no reason known; the folder in which kernels will be stored."""

    def forget() -> None:
        for known in (avx512._kernel, build.cache_folder, availability._trial_failure):
            known.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path / "sd-perf"
    forget()


@each_kernel
@pytest.mark.parametrize(
    "queries, keys, head_dim",
    [
        *((1, 1, 64), (48, 128, 64), (49, 129, 64), (300, 1000, 64), (1000, 1, 64), (17, 257, 64)),
        *((49, 129, 2), (50, 257, 40), (100, 300, 160), (60, 300, 512)),
    ],
)
def test_lengths_around_its_blocks(name, queries, keys, head_dim):
    torch.manual_seed(queries)
    assert error(name, *tensors(name, queries, keys, head_dim)) <= 1


@each_kernel
def test_parts_of_a_fused_projection_of_several_blocks(name):
    q, k, v = torch.randn(2, 300, 3, 5, 40).to(OWN_ATTENTION[name].DTYPE).unbind(2)
    assert not k.is_contiguous()
    assert error(name, q, k, v) <= 1
    dense = torch.randn(2, 5, 40, 300, dtype=q.dtype).permute(0, 3, 1, 2)  # its last dimension has gaps
    assert error(name, dense, k, dense.flip(1)) <= 1


@each_kernel
@pytest.mark.parametrize("score", [131072.0, 1e12, 1e30])
def test_large_scores_select_one_key(name, score):
    """Each query equals one key and is far from the others, in either of two blocks."""
    torch.manual_seed(0)
    kernel, dtype = OWN_ATTENTION[name].attention, OWN_ATTENTION[name].DTYPE
    signs, v = (torch.randint(0, 2, (2, 200, 3, 64)) * 2 - 1).float(), torch.randn(2, 200, 3, 64).to(dtype)
    q = (signs * (score / 8) ** 0.5).to(dtype)
    assert torch.equal(kernel(q, q, v), v)
    assert kernel(q, -q.flip(1), v).isfinite().all()


@each_kernel
def test_a_block_of_larger_scores_takes_over(name):
    """The sums of earlier blocks are scaled down to nothing, and those of later ones count for nothing."""
    q, k, v = tensors(name, 64, 600)
    for block in (slice(0, 40), slice(560, 600)):
        larger = k.clone()
        larger[:, block] *= 40
        assert error(name, q, larger, v) <= 1


@each_kernel
def test_values_that_are_not_finite_stay_so(name):
    """In the result of its query, or of every query for a key or value; nowhere else."""
    for value in (float("nan"), float("inf")):
        for number, rows in enumerate((slice(7, 8), slice(0, 50), slice(0, 50))):
            inputs = tensors(name, 50, 60)
            inputs[number][0, 7, 1] = value
            finite = OWN_ATTENTION[name].attention(*inputs).isfinite()
            assert not finite[0, rows, 1].all(dim=-1).any()
            finite[0, rows, 1] = True
            assert finite.all()


@each_kernel
def test_the_number_of_threads_changes_nothing(name):
    inputs, before = tensors(name, 500, 300), torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outs.append(OWN_ATTENTION[name].attention(*inputs))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def _answer(folder):
    """The result of a kernel of one line; `build.compiled` compiles it where the cache has none."""
    source = folder / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    return build.compiled(source, "answer", (), (), ctypes.CDLL).answer()


@needs_compiler
def test_a_kernel_is_compiled_once_and_stored_for_this_user_alone(empty_cache, monkeypatch, tmp_path):
    assert _answer(tmp_path) == 42
    assert len(list(empty_cache.iterdir())) == 1 and stat.S_IMODE(empty_cache.stat().st_mode) == 0o700
    monkeypatch.setattr(build.subprocess, "run", None)  # nothing is compiled again
    assert _answer(tmp_path) == 42


@needs_compiler
def test_a_damaged_kernel_is_compiled_again(empty_cache, monkeypatch, tmp_path):
    assert _answer(tmp_path) == 42
    (file,) = empty_cache.iterdir()
    damaged = tmp_path / "other" / "sd-perf" / file.name  # elsewhere, since a loaded path is not read again
    damaged.parent.mkdir(mode=0o700, parents=True)
    damaged.write_bytes(file.read_bytes()[:100])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    build.cache_folder.cache_clear()
    assert _answer(tmp_path) == 42
    assert damaged.stat().st_size == file.stat().st_size


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_that_others_can_write_is_not_trusted(empty_cache):
    empty_cache.mkdir(mode=0o700)
    empty_cache.chmod(0o770)
    with pytest.warns(SDWarning, match="every process compiles anew"):
        assert build.cache_folder() != empty_cache
    assert build.cache_folder().is_dir()


@needs_compiler
def test_a_home_that_cannot_be_written_is_no_error(empty_cache, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(SDWarning, match="name one in XDG_CACHE_HOME"):
        assert _answer(tmp_path) == 42
    assert build.cache_folder().is_dir() and tmp_path not in build.cache_folder().parents


def _break_compiler(monkeypatch, folder, error):
    compiler = folder / "g++"
    compiler.write_text(f"#!/bin/sh\necho {error} >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "cpp_compiler", lambda: str(compiler))


@needs_avx512
def test_the_compilers_error_is_a_reason(empty_cache, monkeypatch, tmp_path):
    _break_compiler(monkeypatch, tmp_path, "no such instruction")
    with pytest.raises(Unavailable, match=r"cannot compile avx512\.cpp: no such instruction"):
        check(Attention("sdpa", own="avx512"), "cpu", torch.bfloat16, [64])
    with pytest.warns(SDWarning, match="fast is without avx512_attention: .* no such instruction"):
        assert not avx512.beats_sdpa()
    assert list(empty_cache.iterdir()) == []


@each_kernel
@pytest.mark.slow
@pytest.mark.compile
def test_compiled_networks_call_it(name):
    """The latents of the embedded model are as near to those in fp32 as with PyTorch's kernels."""
    latents = {}
    for kernel, text in (("flash", OWN_KERNELS[f"{name}_attention"]), (name, f"compile,{name}_attention")):
        model = StableDiffusion.tiny(optimisations=parse(text, "cpu"))
        for _ in range(2):  # the second is observed
            latents[kernel] = model.txt2img("a red star", steps=4, seed=1).latents
        assert model.kernels == {"unet": (kernel,), "autoencoder": (kernel,)}
    exact = StableDiffusion.tiny(optimisations=Optimisations()).txt2img("a red star", steps=4, seed=1).latents
    limit = 0.05 if name == "avx512" else 1e-4
    assert all(relative_error(ours, exact) <= limit for ours in latents.values())


@each_kernel
def test_other_inputs_are_refused(name):
    kernel, (q, k, v) = OWN_ATTENTION[name].attention, tensors(name, 4, 5)
    assert kernel(q, k, v).isfinite().all()
    operator = getattr(torch.ops.sd, f"{name}_attention")
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[q.dtype]
    odd = [tensors(name, 4, 4, 7)] if name == "avx512" else []
    for inputs in (*odd, tensors(name, 4, 4, 514), (q.to(other), k, v), (q, k.to(other), v), (q, k, v.to(other))):
        with pytest.raises(NotImplementedError, match="head sizes of at most 512"):
            kernel(*inputs)
    for inputs in ((q, k[:1], v[:1]), (q, k, v[:, 1:]), (q, k[:, :, 1:], v[:, :, 1:]), (q, k[:, :0], v[:, :0])):
        for call in (kernel, operator):
            with pytest.raises((ValueError, RuntimeError), match="do not match"):
                call(*inputs)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        kernel(q.requires_grad_(), k, v)
    reason = unavailable_reason(Attention("sdpa", own=name), "cpu", q.dtype, training=True)
    assert "no support for training" in reason


@each_kernel
def test_a_head_that_it_does_not_support_has_sdpa(name):
    chosen = Attention("sdpa", own=name)
    assert for_head_dim(chosen, "cpu", OWN_ATTENTION[name].DTYPE, 514) == Attention("sdpa")
    assert for_head_dim(chosen, "cpu", torch.float16, 64) == Attention("sdpa")


@pytest.mark.parametrize(
    "technique, kernel, feature, instructions, version",
    [
        ("avx512_attention", "AVX-512", "avx512_attention", "avx512_bf16", "2.5"),
        ("avx2_attention", "AVX2", "avx2", "avx2", "2.10"),
        ("avx2_layers", "AVX2", "avx2", "avx2", "2.10"),
        ("avx512_layers", "AVX-512", "avx2", "avx512_bf16", "2.10"),
    ],
)
def test_machines_that_cannot_run_it(monkeypatch, technique, kernel, feature, instructions, version):
    with pytest.raises(Unavailable, match=f"{technique}: the {kernel} kernel runs on a CPU, and the device is meta"):
        require_available(parse(technique, "cpu"), torch.device("meta"))  # a GPU without bf16 would be refused for that
    module = avx512 if feature == "avx512_attention" else avx2
    of_bf16 = technique == "avx512_layers"
    unavailable_reason = avx2.bf16_unavailable_reason if of_bf16 else module.unavailable_reason
    monkeypatch.setitem(FEATURES, feature, replace(FEATURES[feature], available=True))
    monkeypatch.setattr(avx2, "_problem", lambda: None)
    monkeypatch.setattr(build, "processor_has", lambda name: name == instructions)
    monkeypatch.setattr(build.platform, "system", lambda: "Linux")
    monkeypatch.setattr(build, "cpp_compiler", lambda: None)
    assert "install g++" in unavailable_reason(CPU)
    monkeypatch.setattr(build, "cpp_compiler", lambda: "g++")
    assert unavailable_reason(CPU) is None
    monkeypatch.setattr(build, "processor_has", lambda name: False)
    assert f"Linux and a processor with {instructions}" in unavailable_reason(CPU)
    monkeypatch.setattr(build, "processor_has", lambda name: True)
    monkeypatch.setattr(build.platform, "system", lambda: "Darwin")
    assert f"Linux and a processor with {instructions}" in unavailable_reason(CPU)
    monkeypatch.setitem(FEATURES, feature, replace(FEATURES[feature], available=False))
    assert f"torch >= {version}" in unavailable_reason(CPU)


@pytest.mark.skipif(not has("packed"), reason="fast is fp32 here")
@pytest.mark.parametrize("amx", [False, True])
def test_fast_uses_it_in_bf16_without_amx(monkeypatch, amx):
    monkeypatch.setattr(avx512, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(avx512, "processor_has", lambda name: amx)
    monkeypatch.setattr(avx512, "_kernel", lambda head_dim: None)
    monkeypatch.setattr("sd.optimise.optimisations.why_no_inductor", lambda: None)
    monkeypatch.setattr("sd.optimise.optimisations.bf16_beats_fp32", lambda: True)
    assert parse("fast", "cpu").avx512_attention is not amx
    assert not parse("fast", "cpu", narrow=True).avx512_attention
    for changes in ({"attention": "original"}, {"sdpa_kernels": ("math",)}, {"precision": "full"}):
        assert not parse("fast", "cpu", {"compile": "none", **changes}).avx512_attention
    with pytest.raises(ConfigError, match="openvino: with avx512_attention is not offered"):
        parse("bf16,avx512_attention", "cpu", {"compile": "default", "compile_backend": "openvino"})
    openvino = parse("fast", "cpu", {"compile_backend": "openvino"})
    assert (openvino.precision, openvino.avx512_attention) == ("bf16", False)


@pytest.mark.skipif(not has("packed"), reason="this torch has no packed weights to choose instead")
@pytest.mark.parametrize("avx512_too, faster", [(False, False), (True, False), (True, True)])
def test_fast_uses_the_avx2_kernels_without_avx512_or_where_they_are_faster(monkeypatch, avx512_too, faster):
    monkeypatch.setattr(avx2, "_missing", lambda device, instructions="avx2": None)
    monkeypatch.setattr(avx2, "_problem", lambda: None)
    monkeypatch.setattr("sd.optimise.optimisations.processor_has", lambda name: avx512_too and name == "avx512")
    monkeypatch.setattr(avx2_layers, "beat_packed", lambda dtype=torch.float32: faster)
    monkeypatch.setattr("sd.optimise.optimisations.why_no_inductor", lambda: None)
    monkeypatch.setattr("sd.optimise.optimisations.bf16_beats_fp32", lambda: False)
    own = faster or not avx512_too
    chosen = parse("fast", "cpu")
    assert (chosen.avx2_layers, chosen.avx2_attention, chosen.packed) == (own, own, not own)
    for name, fields in {"packed": (False, own, True), "avx2_layers": (True, own, False)}.items():
        chosen = parse(f"fast,{name}", "cpu")
        assert (chosen.avx2_layers, chosen.avx2_attention, chosen.packed) == fields
    for changes in ({"precision": "bf16"}, {"precision": "autocast"}, {"compile_backend": "openvino"}):
        chosen = parse("fast", "cpu", changes)
        assert not chosen.avx2_layers and not chosen.avx2_attention
    monkeypatch.setattr("sd.optimise.optimisations.bf16_beats_fp32", lambda: True)
    assert (parse("fast", "cpu").precision, parse("fast", "cpu").avx2_layers) == ("bf16", False)
    for chosen in (parse("fast,full", "cpu"), parse("fast", "cpu", {"precision": "full"})):
        assert (chosen.precision, chosen.avx2_layers, chosen.packed) == ("full", own, not own)


@pytest.mark.skipif(not has("packed"), reason="fast is fp32 here")
@pytest.mark.parametrize("faster", [False, True])
def test_fast_has_convolutions_by_tiles_in_bf16_where_they_are_faster(monkeypatch, faster):
    monkeypatch.setattr(avx2, "_missing", lambda device, instructions="avx2": None)
    monkeypatch.setattr(avx2, "_problem", lambda: None)
    monkeypatch.setattr(avx2_layers, "beat_packed", lambda dtype=torch.float32: faster and dtype == torch.bfloat16)
    monkeypatch.setattr("sd.optimise.optimisations.why_no_inductor", lambda: None)
    monkeypatch.setattr("sd.optimise.optimisations.bf16_beats_fp32", lambda: True)
    monkeypatch.setattr("sd.optimise.presets.computes_slowly", lambda dtype: False)
    chosen = parse("fast", "cpu")
    assert (chosen.precision, chosen.packed, chosen.avx512_layers) == ("bf16", True, faster)
    assert parse("fast,int8", "cpu").avx512_layers is faster  # which leaves quantised layers as they are
    by_name = parse("fast,avx512_layers", "cpu")
    assert by_name.packed and by_name.avx512_layers and not parse("fast,packed", "cpu").avx512_layers
    for text in ("fast,full", "fast,separate_bias", "fast,autocast", "fast,freezing"):
        assert not parse(text, "cpu").avx512_layers


@SKIPPED["avx2"]
@pytest.mark.skipif(not has("packed"), reason="this torch has no packed weights to choose instead")
@pytest.mark.parametrize("ours, theirs, faster", [(1, 2, True), (2, 2, False), (2, 1, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_compared_with_packed_weights_by_the_fastest_call(monkeypatch, dtype, ours, theirs, faster):
    if dtype == torch.bfloat16 and avx2.bf16_unavailable_reason(CPU) is not None:
        pytest.skip("the kernel has no bf16 here")
    slow = [0, 9, 0, 9]
    clock = iter(slow + [0, ours, 0, theirs] * (PROBE_CALLS - 1))
    monkeypatch.setattr("sd.features.time.perf_counter", lambda: next(clock))
    state = torch.get_rng_state()
    assert avx2_layers.beat_packed.__wrapped__(dtype) is faster
    assert torch.equal(torch.get_rng_state(), state) and next(clock, None) is None


@SKIPPED["avx2"]
def test_an_avx2_kernel_that_does_not_compile_is_left_out(empty_cache, monkeypatch, tmp_path):
    _break_compiler(monkeypatch, tmp_path, "no such header")
    monkeypatch.setattr(avx2, "_defined", avx2._defined.__wrapped__)
    with pytest.warns(
        SDWarning, match=r"fast is without the AVX2 kernels: .* cannot compile avx2\.cpp: no such header"
    ):
        assert not avx2.run_here()
    model = StableDiffusion.tiny()
    with pytest.raises(Unavailable, match=r"avx2_layers: .* no such header: leave it out"):
        model.optimise(parse("avx2_layers", "cpu"))
    assert model.optimisations == Optimisations()
