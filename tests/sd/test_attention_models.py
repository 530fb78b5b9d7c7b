"""Whole networks and whole pictures under every attention, kernel and precision; on a GPU at full size too."""

from __future__ import annotations

import pytest
import torch
from agreement import (
    DEVICES,
    GPU,
    SEED,
    SETTINGS,
    only_the_allowed_ran,
    optimisations,
    picture,
    psnr,
    tf32,
    unet_bound,
    unet_output,
)
from models import relative_error

from sd import Optimisations, StableDiffusion
from sd.attention.functions import CHOICES
from sd.errors import BadImage, Unavailable
from sd.features import has


def optimise_or_skip(model, wanted: Optimisations):
    try:
        model.optimise(wanted)
    except Unavailable as reason:
        pytest.skip(str(reason))


def model_of(case: str, device: str) -> StableDiffusion:
    """A new one in fp32: the embedded model, or a preset of full size with random weights."""
    original = Optimisations(attention="original")
    if case == "tiny":
        return StableDiffusion.tiny(device, original)
    return StableDiffusion.random(case, device=device, optimisations=original)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((case, device, setting), id=f"{case}-{device}-{setting}", marks=[] if device == "cpu" else GPU)
        for case, device in (("tiny", "cpu"), ("tiny", "cuda"), ("sd2", "cuda"))
        for setting in SETTINGS
    ],
)
def network(request):
    """(model in some precision, what its UNet gave in fp32 with `original` and without TF32, size, the rest of the id).

    One model for each precision, since pure half weights cannot be made whole again.
    """
    case, device, setting = request.param
    model = model_of(case, device)
    size = 64 if case == "sd2" else 8
    with tf32(False):
        reference, _ = unet_output(model, SEED, size)
    return model, reference, size, device, setting


@pytest.mark.parametrize("name", CHOICES)
def test_the_whole_unet_agrees_with_fp32(seed, network, name):
    model, reference, size, device, setting = network
    precision, allow_tf32 = SETTINGS[setting]
    optimise_or_skip(model, optimisations(name, precision))
    with tf32(allow_tf32):
        out, kernels = unet_output(model, seed, size)
    assert relative_error(out, reference) <= unet_bound(setting, device)
    assert psnr(out, reference, peak=(reference.max() - reference.min()).item()) >= 35
    assert only_the_allowed_ran(name, kernels), kernels


@pytest.mark.parametrize("name", [name for name in CHOICES if name != "original"])
@pytest.mark.parametrize("device", DEVICES)
def test_whole_pictures_agree(device, name):
    model = model_of("tiny", device)
    with tf32(False):
        reference = picture(model)
        optimise_or_skip(model, optimisations(name))
        assert (picture(model) - reference).abs().max() <= 2
    assert only_the_allowed_ran(name, model.kernels["unet"]), model.kernels


# fp16 on a CPU is in the tests of large scores below: it takes seconds there.
HALF = [("cpu", "autocast"), ("cpu", "bf16")] + [
    pytest.param("cuda", precision, marks=GPU) for precision in ("autocast", "fp16", "bf16")
]


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("device, precision", HALF)
def test_whole_pictures_agree_in_half_precision(device, name, precision):
    model = model_of("tiny", device)
    with tf32(False):
        reference = picture(model)
    optimise_or_skip(model, optimisations(name, precision))
    assert psnr(picture(model), reference) >= 35


# --- scores beyond fp16


def with_large_scores(device: str) -> StableDiffusion:
    """The embedded model with one attention whose q.k, up to 117 000 where measured, is infinite in fp16."""
    model = model_of("tiny", device)
    blocks = model.unet.transformer_blocks()
    attention = blocks[len(blocks) // 2].attn1
    attention.to_q.weight.mul_(64)
    attention.to_k.weight.mul_(64)
    return model


@pytest.mark.parametrize(
    "device, precision",  # autocast on a CPU is bf16, which overflows as late as fp32
    [("cpu", "fp16"), pytest.param("cuda", "fp16", marks=GPU), pytest.param("cuda", "autocast", marks=GPU)],
)
def test_upcast_prevents_the_black_image(device, precision):
    model = with_large_scores(device)
    optimise_or_skip(model, Optimisations(attention="original", precision=precision, attention_precision="input"))
    with pytest.raises(BadImage, match="attention_precision fp32"):
        picture(model)
    model.optimise(Optimisations(attention="original", precision=precision))
    assert picture(model).float().std() > 5


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("device", DEVICES)
def test_large_scores_in_fp16_give_the_picture_of_fp32(device, name):
    model = with_large_scores(device)
    with tf32(False):
        reference = picture(model)
    optimise_or_skip(model, optimisations(name, "fp16"))
    assert psnr(picture(model), reference) >= 40


# --- compiling, switching and observing


@pytest.mark.compile
@pytest.mark.skipif(not has("compile"), reason="this torch has no torch.compile")
@pytest.mark.parametrize("name", ["original", "mha", "sdpa"])
def test_attention_is_one_graph(name):
    """Captured whole, without a graph break, by the part of torch.compile that comes before any code is generated."""
    model = model_of("tiny", "cpu")
    model.optimise(optimisations(name))
    block, vae = model.unet.transformer_blocks()[0], model.autoencoder.decoder.mid.attn_1
    width, vae_width = block.norm1.weight.numel(), model.autoencoder.head_dim()
    generator = torch.Generator().manual_seed(0)
    for module, inputs in (
        (block, (torch.randn(2, 64, width, generator=generator), torch.randn(2, 77, 32, generator=generator), (8, 8))),
        (vae, (torch.randn(2, vae_width, 8, 8, generator=generator),)),
    ):
        with torch.no_grad():
            compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(*inputs)
            assert relative_error(compiled, module(*inputs)) <= 1e-5


@pytest.fixture
def model():
    return model_of("tiny", "cpu")


def test_switching_shares_the_weights_and_comes_back(model):
    names = {name: weight.clone() for name, weight in model.unet.state_dict().items()}
    before = picture(model)
    model.optimise(Optimisations(attention="mha"))
    attention = model.unet.transformer_blocks()[0].attn2
    pointer = attention.mha.k_proj_weight.data_ptr()
    model.optimise(Optimisations(attention="original"))
    assert model.unet.transformer_blocks()[0].attn2.to_k.weight.data_ptr() == pointer
    assert all(torch.equal(weight, names[name]) for name, weight in model.unet.state_dict().items())
    assert torch.equal(picture(model), before)


def test_kernels_are_observed_in_both_networks(model):
    picture(model)
    assert model.kernels == {"unet": ("softmax",), "autoencoder": ("softmax",)}
    if has("cpu_flash"):
        for kernel in ("math", "flash"):
            model.optimise(Optimisations(attention="sdpa", sdpa_kernels=(kernel,)))
            picture(model)
            assert model.kernels == {"unet": (kernel,), "autoencoder": (kernel,)}


def test_the_vae_says_what_it_took(model):
    """xFormers on a CPU takes at most 32 numbers a head, and the VAE's has 48."""
    optimise_or_skip(model, Optimisations(attention="xformers"))
    picture(model)
    assert model.kernels["unet"] == ("small_k",)
    taken = model.autoencoder.attention.implementation
    assert taken == ("sdpa" if has("sdpa") else "original") and model.kernels["autoencoder"]
