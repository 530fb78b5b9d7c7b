"""Approximate techniques: PSNR bounds of each on images of the embedded model."""

from __future__ import annotations

import pytest
import torch
from models import relative_error, seeded

from sd import Optimisations, StableDiffusion
from sd.config.presets import UNetConfig
from sd.errors import ConfigError, Unavailable
from sd.kernels import avx2
from sd.models.token_merging import merging
from sd.models.unet import UNet
from sd.optimise import avx2_layers
from sd.optimise.approximate import CachedFeatures, quantise
from sd.optimise.packed import Packed

NO_AVX512 = avx2.bf16_unavailable_reason(torch.device("cpu"))
PROMPTS = ["a red star on a white background", "a green ring on a blue background"]


@pytest.fixture(autouse=True)
def _torchao_or_skip(request):
    if request.node.get_closest_marker("quant"):
        pytest.importorskip("torchao.quantization", reason="the extra `quant` is not installed")


@pytest.fixture(scope="module")
def model():
    return StableDiffusion.tiny()


@pytest.fixture(scope="module")
def exact(model):
    return _images(model)


def _images(model):
    return model.txt2img(PROMPTS, steps=50, sampler="ddim", scale=4.0, seed=2).images.float()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields, psnr",  # measured 39.8, 48.0 and 42.7 dB
    [({"token_merging": 0.25}, 36), ({"feature_caching": 2}, 44), ({"feature_caching": 3}, 39)],
    ids=lambda value: str(value),
)
def test_psnr_is_above_its_bound(model, exact, fields, psnr):
    model.optimise(Optimisations(**fields))
    error = (_images(model) - exact).pow(2).mean()
    model.optimise(Optimisations())
    assert error > 0, "nothing was approximated"
    assert 10 * torch.log10(255**2 / error) >= psnr
    assert torch.equal(_images(model), exact)


def test_unmerging_restores_token_positions():
    """Merging identical 2x2 cells is lossless; merging nothing is the identity."""
    cells = torch.randn(2, 4, 6, 16, generator=torch.Generator().manual_seed(0))
    tokens = cells.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1, 2)
    merge, unmerge = merging(tokens, (8, 12), 0.75)
    assert merge(tokens).shape == (2, 24, 16)
    assert torch.allclose(unmerge(merge(tokens)), tokens, atol=1e-5)
    tokens = torch.randn(2, 96, 16)
    merge, unmerge = merging(tokens, (8, 12), 0.0)
    assert torch.equal(unmerge(merge(tokens)), tokens)


def test_the_deep_part_runs_every_third_call():
    deep_of_calls = []

    def call(x, timesteps, context, deep):
        deep_of_calls.append(deep)
        return x, len(deep_of_calls)

    features = CachedFeatures(call, 3)
    for _ in range(7):
        features(None, None, None)
    assert deep_of_calls == [None, 1, 2, None, 4, 5, None]


def test_cached_features_of_the_same_call_are_exact():
    unet = seeded(
        UNet,
        UNetConfig(context_dim=24, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, num_heads=4),
    )
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 5.0]), torch.randn(2, 77, 24)
    out, deep = unet.forward_with_features(x, t, context, None)
    assert torch.equal(unet.forward_with_features(x, t, context, deep)[0], out)
    assert torch.equal(unet(x, t, context), out)


@pytest.mark.quant
def test_int8_psnr_is_above_its_bound(exact):
    """All layers quantised, regardless of width."""
    model = StableDiffusion.tiny()
    quantise(model.unet, "int8", smallest=1)
    model.optimise(Optimisations(quantisation="int8"))
    error = (_images(model) - exact).pow(2).mean()
    assert error > 0, "nothing was approximated"
    assert 10 * torch.log10(255**2 / error) >= 45  # measured 48.9 dB
    with pytest.raises(ConfigError, match="already rounded to int8"):
        model.optimise(Optimisations())


@pytest.mark.quant
def test_int8_of_a_narrow_model_is_refused(model):
    with pytest.raises(Unavailable, match="quantisation int8: this model has no linear layer of 128 features"):
        model.optimise(Optimisations(quantisation="int8"))
    assert model.unet.quantisation == "none"


WIDE = UNetConfig(
    context_dim=128,
    model_channels=128,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(1,),
    num_head_channels=64,
    use_linear_in_transformer=True,
)


@pytest.mark.quant
def test_int8():
    unet = seeded(UNet, WIDE)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([501.0, 501.0]), torch.randn(2, 77, 128)
    with torch.no_grad():
        expected = unet(x, t, context)
        quantise(unet, "int8")
        rounded = unet(x, t, context)
        compiled = torch.compile(unet, fullgraph=True, dynamic=False)(x, t, context)
    assert unet.quantisation == "int8"
    assert 0 < relative_error(rounded, expected) < 0.05
    assert relative_error(compiled, rounded) < 0.01  # single activations round differently


@pytest.mark.quant
@pytest.mark.skipif(NO_AVX512 is not None, reason=str(NO_AVX512))
def test_int8_with_the_kernels_of_bf16():
    """Only plain layers are packed."""
    unet = seeded(UNet, WIDE).bfloat16()
    quantise(unet, "int8")
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([501.0, 501.0]), torch.randn(2, 77, 128).bfloat16()
    with torch.no_grad():
        expected = unet(x, t, context)
        linear = {type(module.weight.data) for module in unet.modules() if isinstance(module, torch.nn.Linear)}
        avx2_layers.pack(unet)
        packed = {type(module) for module in unet.modules() if isinstance(module, Packed)}
        assert linear - {torch.Tensor} and packed == {avx2_layers.Avx2Conv2d, avx2_layers.Avx2GroupNorm}
        assert relative_error(unet(x, t, context).float(), expected.float()) < 0.03


def test_fp8_is_refused_without_its_gpu(model):
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        pytest.skip("this GPU has fp8")
    with pytest.raises(Unavailable, match="quantisation fp8: needs"):
        model.optimise(Optimisations(quantisation="fp8"))
