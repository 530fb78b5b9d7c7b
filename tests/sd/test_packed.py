"""Packed weights on a CPU: exact, undone bit for bit, without a second copy, and in the layout that oneDNN wants."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from counting import Counting
from models import SMALLEST, relative_error
from selection import slow_or_nightly
from torch import nn

from sd import Optimisations, StableDiffusion
from sd.errors import ConfigError, SDWarning, Unavailable
from sd.features import FEATURES, PROBE_CALLS, bf16_beats_fp32, computes_slowly, has
from sd.kernels import avx2
from sd.models.layers import GroupNorm
from sd.optimise import apply, avx2_layers, packed
from sd.optimise.compile import Compiler
from sd.optimise.presets import parse

NO_AVX2, NO_AVX512 = (check(torch.device("cpu")) for check in (avx2.unavailable_reason, avx2.bf16_unavailable_reason))
needs_avx2 = pytest.mark.skipif(NO_AVX2 is not None, reason=str(NO_AVX2))
needs_avx512 = pytest.mark.skipif(NO_AVX512 is not None, reason=str(NO_AVX512))
needs_packed = pytest.mark.skipif(not has("packed"), reason="this torch has no operators for packed weights")
needs_bf16 = pytest.mark.skipif(computes_slowly(torch.bfloat16), reason="this processor emulates bf16")
PLAIN = Optimisations(channels_last=True, fused_qkv=True, cache_context_kv=True)
BASES = {"packed": PLAIN, "avx2_layers": PLAIN, "avx512_layers": replace(PLAIN, precision="bf16")}
TECHNIQUES = {name: replace(base, **{name: True}) for name, base in BASES.items()}
BOUNDS = {"packed": 1e-5, "avx2_layers": 1e-5, "avx512_layers": 0.05}  # of the latents; two runs in bf16 differ
WIDE = replace(
    SMALLEST, unet=replace(SMALLEST.unet, model_channels=128), autoencoder=replace(SMALLEST.autoencoder, channels=128)
)
CALLS_OF_TWO_SIZES = """
import torch
from torch import nn
from sd.optimise import packed

torch.set_num_threads(1)
calls, images = ((2, 16), (2, 16), (2, 32), (2, 32), (1, 32), (1, 32), (2, 16)), {}
for packing, calling in (torch.no_grad, torch.no_grad), (torch.no_grad, torch.inference_mode), (torch.inference_mode,) * 2:
    layers = nn.Conv2d(320, 320, 3, padding=1), nn.Conv2d(320, 136, 3, padding=1, stride=2), nn.Conv2d(136, 128, 1)
    with packing():
        network = nn.Sequential(*layers)
        for batch, side in calls:
            image = torch.randn(batch, 320, side, side).contiguous(memory_format=torch.channels_last)
            images[batch, side] = image, network(image)
        packed.pack(network)
    for call in calls:
        image, expected = images[call]
        print("call", flush=True)
        with calling():
            out = network(image)
            layouts = [packed._description(layer.weight) for layer in network]
        print("layout", b"".join(layouts).hex(), flush=True)
        assert (out - expected).norm() <= 1e-5 * expected.norm()
"""
CLASSES = {
    "packed": {packed.PackedConv2d, packed.PackedConv1x1, packed.PackedLinear},
    **{
        name: {avx2_layers.Avx2Conv2d, avx2_layers.Avx2Linear, avx2_layers.Avx2GroupNorm}
        for name in ("avx2_layers", "avx512_layers")
    },
}


@pytest.fixture
def model(technique):
    return StableDiffusion.random(WIDE, optimisations=BASES[technique])


def _run(model):
    return model.txt2img("a red star", steps=2, seed=1)


def _copy(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def _equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in other)


def _packed_layers(network):
    return [module for module in network.modules() if isinstance(module, packed.Packed)]


@pytest.mark.parametrize(
    "technique",
    [
        pytest.param("packed", marks=needs_packed),
        pytest.param("avx2_layers", marks=needs_avx2),
        pytest.param("avx512_layers", marks=needs_avx512),
    ],
)
class TestPacked:
    def test_gradients_are_refused(self, technique):
        image = (1, 128, 4, 4)
        for layer, shape in (
            (nn.Linear(128, 128), (2, 128)),
            (nn.Conv2d(128, 128, 3), image),
            (nn.Conv2d(128, 128, 1), image),
            *([] if technique == "packed" else [(GroupNorm(32, 128), image)]),
        ):
            dtype = torch.bfloat16 if technique == "avx512_layers" else torch.float32
            (packed if technique == "packed" else avx2_layers).pack(layer.to(dtype))
            assert type(layer) in CLASSES[technique]
            x = torch.zeros(shape, dtype=dtype, requires_grad=True)
            with torch.no_grad():
                layer(x)
            with pytest.raises(NotImplementedError, match=f"{technique}: has no backward pass"):
                layer(x)

    @pytest.mark.slow
    def test_same_images_and_undone_bit_for_bit(self, model, technique):
        plain, weights = _run(model), _copy(model)
        layer = model.unet.middle_block[0].out_layers[3]
        alive = weakref.ref(layer.weight)
        model.optimise(TECHNIQUES[technique])
        assert alive() is None  # no second copy
        assert {type(module) for module in _packed_layers(model.unet)} == CLASSES[technique]
        assert relative_error(_run(model).latents, plain.latents) <= BOUNDS[technique]
        assert _equal(model.state_dict(), weights)
        for attention in ("original", "mha", "sdpa"):
            model.optimise(replace(parse(f"none,{technique}", "cpu"), attention=attention))
            assert relative_error(_run(model).latents, plain.latents) <= BOUNDS[technique]
        model.optimise(BASES[technique])
        assert not _packed_layers(model.unet) and not _packed_layers(model.autoencoder)
        assert _equal(model.state_dict(), weights)
        assert torch.equal(_run(model).latents, plain.latents)

    def test_every_wide_layer_runs_packed(self, model, technique):
        latents, counts = torch.zeros(1, 4, 8, 8).contiguous(memory_format=torch.channels_last), []
        autoencoder = model.autoencoder
        for fields in (BASES[technique], TECHNIQUES[technique]):
            model.optimise(fields)
            with torch.no_grad(), Counting() as counting:
                autoencoder.decode(latents)
            counts.append(counting.copies)
        expected = sum(len(_packed_layers(part)) for part in (autoencoder.post_quant_conv, autoencoder.decoder))
        assert expected > 10
        own = ("avx2_layer", "avx2_group_norm")
        operators = ("packed_convolution", "packed_linear") if technique == "packed" else own
        assert sum(counting.ops[name] for name in operators) == expected
        assert counts[0] == counts[1]

    def test_lora_is_merged_into_the_plain_weights(self, model, tmp_path, technique):
        generator, factors = torch.Generator().manual_seed(0), {}
        for name, weight in model.state_dict().items():
            if name.endswith(("to_q.weight", "to_out.0.weight")):
                module = name[: -len(".weight")]
                factors[f"{module}.lora_A.weight"] = torch.randn(2, weight.shape[1], generator=generator)
                factors[f"{module}.lora_B.weight"] = 0.02 * torch.randn(len(weight), 2, generator=generator)
        torch.save(factors, tmp_path / "lora.pt")
        before = _copy(model)
        model.load_lora(tmp_path / "lora.pt")
        merged, plain = _copy(model), _run(model)
        model.unload_lora()
        model.optimise(TECHNIQUES[technique])
        model.load_lora(tmp_path / "lora.pt")
        assert _packed_layers(model.unet)
        assert _equal(model.state_dict(), merged)
        assert relative_error(_run(model).latents, plain.latents) <= BOUNDS[technique]
        model.unload_lora()
        assert _equal(model.state_dict(), before)
        model.load_state_dict(merged)
        assert _packed_layers(model.unet) and _equal(model.state_dict(), merged)
        model.unet.load_state_dict(model.unet.state_dict())  # the network alone: its layers are plain then
        assert not _packed_layers(model.unet)
        assert relative_error(_run(model).latents, plain.latents) <= BOUNDS[technique]

    @pytest.mark.slow
    @pytest.mark.compile
    def test_other_weights_compile_nothing_again(self, model, technique):
        from torch._dynamo.utils import counters

        weights = _copy(model)
        model.optimise(replace(TECHNIQUES[technique], compile="default", compile_backend="aot_eager"))
        first = _run(model).latents
        torch._dynamo.reset()
        counters.clear()
        _run(model)
        graphs = counters["stats"]["unique_graphs"]
        assert graphs == 1 and not counters["graph_break"]
        model.load_state_dict({name: weight * 0.5 for name, weight in weights.items()})
        assert relative_error(_run(model).latents, first) > 2 * BOUNDS[technique]
        model.load_state_dict(weights)
        assert torch.equal(_run(model).latents, first)
        assert counters["stats"]["unique_graphs"] == graphs

    @pytest.mark.compile
    @pytest.mark.parametrize(
        "fields",
        [
            pytest.param({"compile_autoencoder": "default"}, marks=pytest.mark.slow),
            pytest.param({"compile_scope": "blocks"}, marks=pytest.mark.nightly),
        ],
    )
    def test_inductor(self, model, fields, technique):
        from torch._dynamo.utils import counters

        plain = _run(model).latents
        for _ in range(2):
            torch._dynamo.reset()
            counters.clear()
            model.optimise(replace(TECHNIQUES[technique], compile="default", **fields))
            assert relative_error(_run(model).latents, plain) <= BOUNDS[technique]
        if technique == "packed":
            convolutions = [layer for layer in _packed_layers(model.unet) if isinstance(layer, packed.PackedConv2d)]
            assert all(vars(layer.weight)["fits"] for layer in convolutions), "compiled code passes other tensors"
        if has("compile_cache"):
            assert _cache_hits(counters), "the reset simulates another process"


@needs_packed
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86-64")
@pytest.mark.parametrize("instructions", slow_or_nightly(["DEFAULT", "AVX2", "SSE41"], lambda one: one != "SSE41"))
def test_a_weight_is_reordered_for_another_image_size_only(instructions):
    """With AVX2 the layout depends on the size on some processors, and oneDNN would reorder a weight of another one each time."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "ONEDNN_VERBOSE": "1"}
    command = [sys.executable, "-c", CALLS_OF_TWO_SIZES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    every = re.findall(r"^call$(.*?)^layout (\w+)$", done.stdout, re.MULTILINE | re.DOTALL)
    assert len(every) == 3 * 7
    for calls in every[:7], every[7:14], every[14:]:
        products, reorders = (
            [sum(log.count(f",{name},") for name in names) for log, _ in calls]
            for names in (("convolution", "inner_product"), ("reorder",))
        )
        layouts = [layout for _, layout in calls]
        assert products == [3] * 7
        assert reorders[1] == reorders[3] == reorders[5] == 0, "a call like the last one"
        assert (reorders[6] > 0) is (layouts[6] != layouts[5]), "a size that was seen before"
        assert reorders[0] > 0


@needs_packed
@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.skipif(not has("compile_cache"), reason="torch >= 2.7")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)])
def test_code_with_packed_weights_is_cached(dtype, tmp_path, monkeypatch):
    """A second compilation, of other weights, finds the code of the first."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    packed.cache_code()
    hits = []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        network = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.SiLU(), nn.Conv2d(128, 128, 1))
        network.requires_grad_(False).to(dtype=dtype, memory_format=torch.channels_last)
        x = torch.randn(2, 128, 8, 8, dtype=dtype).to(memory_format=torch.channels_last)
        expected = network(x)
        packed.pack(network)
        bound = 1e-5 if dtype == torch.float32 else 0.02
        assert relative_error(Compiler("default")(network.forward)(x), expected) < bound
        assert vars(network[0].weight)["fits"], "compiled code passes another tensor"
        hits.append(_cache_hits(counters))
    assert hits[0] == 0 < hits[1]


@pytest.mark.skipif(not has("cache_validator"), reason="this torch has no such check")
def test_code_with_constants_of_onednn_is_not_cached():
    from torch._inductor.codecache import BypassFxGraphCache, CacheabilityValidator

    packed.cache_code()
    with pytest.raises(BypassFxGraphCache):
        CacheabilityValidator.check_tensor(torch.ones(2, 2).to_mkldnn())


def _cache_hits(counters):
    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]


@pytest.mark.parametrize(
    "fields",
    [{"precision": "autocast"}, {"quantisation": "int8"}, {"compile": "default", "inductor": ("freezing",)}],
)
def test_other_weights_are_refused(fields):
    with pytest.raises(ConfigError, match="packed"):
        Optimisations(packed=True, channels_last=True, **fields)


def test_nchw_is_refused():
    with pytest.raises(ConfigError, match="choose channels_last"):
        Optimisations(packed=True)


def test_a_gpu_and_an_old_torch_are_refused(monkeypatch):
    with pytest.raises(Unavailable, match=r"packed: .* cuda"):
        apply.require_available(Optimisations(packed=True, channels_last=True), torch.device("cuda"))
    monkeypatch.setitem(FEATURES, "packed", replace(FEATURES["packed"], available=False))
    with pytest.raises(Unavailable, match=r"packed needs .*torch >= 2\.4"):
        apply.require_available(Optimisations(packed=True, channels_last=True), torch.device("cpu"))
    assert not Optimisations.fast("cpu").packed
    assert Optimisations.fast("cpu").precision == "full"


@needs_packed
def test_packed_needs_the_instructions_of_its_precision(monkeypatch):
    """oneDNN packs no fp16 weights without them, and plain layers are emulated."""
    monkeypatch.setattr("sd.optimise.optimisations.why_no_inductor", lambda: None)
    for supported in (False, True):
        slow = lambda dtype, supported=supported: dtype == torch.float16 and not supported  # noqa: E731
        monkeypatch.setattr("sd.optimise.presets.computes_slowly", slow)
        monkeypatch.setattr("sd.optimise.apply.computes_slowly", slow)
        assert parse("fast,fp16", "cpu").packed is supported
        assert parse("fast,full,packed", "cpu").packed
    monkeypatch.setattr("sd.optimise.apply.computes_slowly", lambda dtype: True)
    with (
        pytest.warns(SDWarning),
        pytest.raises(Unavailable, match="packed: this processor has no instructions for fp16"),
    ):
        apply.require_available(Optimisations(precision="fp16", packed=True, channels_last=True), torch.device("cpu"))


@needs_packed
def test_fast_is_bf16_where_it_is_faster_and_the_layers_are_wide(monkeypatch):
    monkeypatch.setattr("sd.optimise.optimisations.why_no_inductor", lambda: None)
    for faster in (False, True):
        monkeypatch.setattr("sd.optimise.optimisations.bf16_beats_fp32", lambda faster=faster: faster)
        assert Optimisations.fast("cpu").precision == ("bf16" if faster else "full")
        assert parse("fast", "cpu", narrow=True).precision == "full"
        assert parse("fast,full", "cpu").precision == "full"


@needs_packed
def test_bf16_needs_instructions_and_a_faster_product(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("sd.features.time.perf_counter", lambda: next(clock))
    for bits in (False, True):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda bits=bits: bits, raising=False)
        assert not bf16_beats_fp32.__wrapped__()  # on this clock both take the same time
    durations = iter([0, 2, 0, 1] * PROBE_CALLS)
    monkeypatch.setattr("sd.features.time.perf_counter", lambda: next(durations))
    assert bf16_beats_fp32.__wrapped__()


@needs_packed
@needs_bf16
@torch.no_grad()
@pytest.mark.parametrize("technique", ["packed", pytest.param("avx512_layers", marks=needs_avx512)])
def test_error_of_bf16(technique):
    """Packed and plain bf16 are as far from fp32, in the UNet and the autoencoder."""
    model = StableDiffusion.random(WIDE, optimisations=PLAIN)
    x, t, context = torch.randn(2, 4, 8, 8), torch.full((2,), 501.0), torch.randn(2, 77, 32)
    x = x.contiguous(memory_format=torch.channels_last)

    def outputs():
        return model.unet(x, t, context.to(model.unet.dtype)).float(), model.autoencoder.decode(x)

    expected = outputs()
    model.optimise(replace(PLAIN, precision="bf16"))
    plain = [relative_error(actual, wanted) for actual, wanted in zip(outputs(), expected)]
    model.optimise(replace(TECHNIQUES[technique], precision="bf16"))
    for actual, wanted, error in zip(outputs(), expected, plain):
        assert 1e-4 < relative_error(actual, wanted) <= min(1.2 * error, 0.03)


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported"), reason="this torch cannot tell")
def test_precisions_that_the_processor_emulates_are_warned_of_once(monkeypatch, recwarn):
    warnings.simplefilter("default", SDWarning)  # as the command lines do
    for name, supported in (("fp16", False), ("bf16", False), ("bf16", True)):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda supported=supported: supported)
        recwarn.clear()
        for _ in range(2):
            apply.require_available(Optimisations(precision=name), torch.device("cpu"))
        messages = [str(warning.message) for warning in recwarn if warning.category is SDWarning]
        assert [f"precision {name}" in message for message in messages] == [True] * (not supported)
