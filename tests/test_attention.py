"""Every attention implementation and kernel against the original in float64, and what is refused, shared and observed."""

from __future__ import annotations

import pytest
import torch

from sd import Optimisations, StableDiffusion
from sd.attention import SDPA_KERNELS, Attention, allowed_kernels, check, original, why_not
from sd.errors import ConfigError, Unavailable
from sd.features import has

# Half types round their inputs' products once and the result once more: a few times their epsilon.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11}
CHOICES = {
    "original": Attention("original"),
    "xformers": Attention("xformers"),
    "sdpa": Attention("sdpa"),
    **{f"sdpa-{kernel}": Attention("sdpa", (kernel,)) for kernel in SDPA_KERNELS},
}


def _usable(choice, device, dtype, head_dim):
    reason = why_not(choice, device, dtype, head_dim)
    if reason:
        pytest.skip(reason)


def _compare(choice, device, dtype, head_dim, tokens, context):
    _usable(choice, device, dtype, head_dim)
    generator = torch.Generator().manual_seed(head_dim + tokens)
    q = torch.randn(2, tokens, 3, head_dim, generator=generator).to(device, dtype)
    k, v = (torch.randn(2, context, 3, head_dim, generator=generator).to(device, dtype) for _ in range(2))
    expected = original(q.double(), k.double(), v.double(), upcast=False)
    with allowed_kernels(choice):
        out = choice.function()(q, k, v)
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() <= BOUNDS[dtype] * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("tokens, context", [(64, 64), (64, 77), (37, 37)], ids=["self", "cross", "odd"])
@pytest.mark.parametrize("head_dim", [32, 40, 64, 80, 160, 512])
@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", CHOICES)
def test_equals_the_original(name, dtype, head_dim, tokens, context):
    if dtype == torch.float16 and not has("cpu_fp16"):
        pytest.skip("this torch computes no fp16 on the CPU")
    _compare(CHOICES[name], "cpu", dtype, head_dim, tokens, context)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("head_dim", [40, 64, 80, 160, 512])
@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", CHOICES)
def test_equals_the_original_on_a_gpu(name, dtype, head_dim):
    _compare(CHOICES[name], "cuda", dtype, head_dim, 64, 77)


@pytest.mark.skipif(not has("cpu_fp16"), reason="this torch computes no fp16 on the CPU")
def test_upcast_prevents_the_black_image():
    """Scores beyond 65504, as SD 2.1 makes them: infinite in fp16, finite with q and k upcast."""
    q = torch.full((1, 8, 1, 64), 60.0, dtype=torch.float16)
    assert not torch.isfinite(original(q, q, q, upcast=False)).all()
    assert torch.allclose(original(q, q, q).float(), torch.tensor(60.0))


@pytest.mark.parametrize(
    "wrong", [{"implementation": "flash3"}, {"kernels": ("fast",)}, {"kernels": ()}, {"precision": "fp8"}]
)
def test_unknown_names(wrong):
    with pytest.raises(ConfigError):
        Attention(**wrong)


def test_a_refusal_says_why_and_what_there_is():
    with pytest.raises(Unavailable, match="Available here: original"):
        check(Attention("sdpa", ("cudnn",)), "cpu", torch.float32, [64])


@pytest.fixture
def model():
    return StableDiffusion.tiny(optimisations=Optimisations(attention="original"))


def _picture(model):
    return model.txt2img(
        "a red star on a white background", steps=8, sampler="ddim", scale=4.0, seed=2, batch=2
    ).images.int()


@pytest.mark.parametrize("attention", ["xformers", "mha", "sdpa"])
def test_whole_pictures_agree(model, attention):
    reference = _picture(model)
    try:
        model.optimise(Optimisations(attention=attention))
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert (_picture(model) - reference).abs().max() <= 2


@pytest.mark.parametrize("attention", ["original", "mha", "sdpa"])
def test_whole_pictures_agree_in_bf16(model, attention):
    reference = _picture(model)
    try:
        model.optimise(Optimisations(attention=attention, precision="bf16"))
    except Unavailable as reason:
        pytest.skip(str(reason))
    error = (_picture(model) - reference).float().pow(2).mean()
    assert 10 * torch.log10(255**2 / error) >= 35


def test_switching_shares_the_weights_and_comes_back(model):
    names = {name: weight.clone() for name, weight in model.unet.state_dict().items()}
    picture = _picture(model)
    model.optimise(Optimisations(attention="mha"))
    attention = model.unet.transformer_blocks()[0].attn2
    pointer = attention.mha.k_proj_weight.data_ptr()
    model.optimise(Optimisations(attention="original"))
    assert model.unet.transformer_blocks()[0].attn2.to_k.weight.data_ptr() == pointer
    assert all(torch.equal(weight, names[name]) for name, weight in model.unet.state_dict().items())
    assert torch.equal(_picture(model), picture)


def test_kernels_are_observed(model):
    _picture(model)
    assert model.kernels["unet"] == ("softmax",)
    if has("cpu_flash"):
        model.optimise(Optimisations(attention="sdpa", sdpa_kernels=("math",)))
        _picture(model)
        assert model.kernels["unet"] == ("math",)
