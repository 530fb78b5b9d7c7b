"""Networks and images with every attention backend, kernel and precision; on a GPU at full size too."""

from __future__ import annotations

import functools

import pytest
import torch
from agreement import (
    DEVICES,
    GPU,
    SEED,
    SETTINGS,
    images_of,
    only_allowed_kernels,
    optimisations,
    psnr,
    tf32,
    unet_bound,
    unet_output,
)
from models import relative_error
from selection import slow_or_nightly

from sd import Optimisations, StableDiffusion
from sd.attention.functions import CHOICES
from sd.errors import BadImage, Unavailable
from sd.features import has


def optimise_or_skip(model, choice: Optimisations):
    try:
        model.optimise(choice)
    except Unavailable as reason:
        pytest.skip(str(reason))


def model_of(case: str, device: str) -> StableDiffusion:
    """A new fp32 model: the embedded one, or a full-size preset with random weights."""
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
    """(model, its UNet's output in fp32 with `original` and without TF32, latent size, device, setting).

    One model for each precision, since weights rounded to a half type cannot be restored.
    """
    case, device, setting = request.param
    model = model_of(case, device)
    size = 64 if case == "sd2" else 8
    with tf32(False):
        reference, _ = unet_output(model, SEED, size)
    return model, reference, size, device, setting


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICES)
def test_unet_agrees_with_fp32(seed, network, name):
    model, reference, size, device, setting = network
    precision, allow_tf32 = SETTINGS[setting]
    optimise_or_skip(model, optimisations(name, precision))
    with tf32(allow_tf32):
        out, kernels = unet_output(model, seed, size)
    assert relative_error(out, reference) <= unet_bound(setting, device)
    assert psnr(out, reference, peak=(reference.max() - reference.min()).item()) >= 35
    assert only_allowed_kernels(name, kernels), kernels


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHOICES if name != "original"])
@pytest.mark.parametrize("device", DEVICES)
def test_images_agree(device, name):
    model = model_of("tiny", device)
    with tf32(False):
        reference = images_of(model)
        optimise_or_skip(model, optimisations(name))
        assert (images_of(model) - reference).abs().max() <= 2
    assert only_allowed_kernels(name, model.kernels["unet"]), model.kernels


# The tests of large scores below cover fp16 on the CPU, which takes seconds.
HALF = [("cpu", "autocast"), ("cpu", "bf16")] + [
    pytest.param("cuda", precision, marks=GPU) for precision in ("autocast", "fp16", "bf16")
]
# The other choices differ in the kernels of SDPA alone, and half precision takes seconds on a CPU.
HALF_CHOICES = slow_or_nightly(CHOICES, lambda name: name in ("sdpa", "mha", "original", "sdpa-avx512"))


@functools.cache
def fp32_images(make, *arguments) -> torch.Tensor:
    with tf32(False):
        return images_of(make(*arguments))


@pytest.mark.parametrize("name", HALF_CHOICES)
@pytest.mark.parametrize("device, precision", HALF)
def test_images_agree_in_half_precision(device, name, precision):
    model = model_of("tiny", device)
    optimise_or_skip(model, optimisations(name, precision))
    assert psnr(images_of(model), fp32_images(model_of, "tiny", device)) >= 35


# --- scores that overflow fp16


def with_large_scores(device: str) -> StableDiffusion:
    """The embedded model with one attention whose scores (up to 117 000 in fp32) overflow fp16."""
    model = model_of("tiny", device)
    blocks = model.unet.transformer_blocks()
    attention = blocks[len(blocks) // 2].attn1
    attention.to_q.weight.mul_(64)
    attention.to_k.weight.mul_(64)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "device, precision",  # autocast on a CPU is bf16, which has the range of fp32
    [("cpu", "fp16"), pytest.param("cuda", "fp16", marks=GPU), pytest.param("cuda", "autocast", marks=GPU)],
)
def test_upcast_prevents_the_black_image(device, precision):
    model = with_large_scores(device)
    optimise_or_skip(model, Optimisations(attention="original", precision=precision, attention_precision="input"))
    with pytest.raises(BadImage, match="attention_precision fp32"):
        images_of(model)
    model.optimise(Optimisations(attention="original", precision=precision))
    assert images_of(model).float().std() > 5


@pytest.mark.parametrize("name", HALF_CHOICES)
@pytest.mark.parametrize("device", DEVICES)
def test_large_scores_in_fp16_give_the_image_of_fp32(device, name):
    model = with_large_scores(device)
    optimise_or_skip(model, optimisations(name, "fp16"))
    assert psnr(images_of(model), fp32_images(with_large_scores, device)) >= 40


# --- compiling, switching and recording kernels


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.skipif(not has("compile"), reason="this torch has no torch.compile")
@pytest.mark.parametrize("name", ["original", "mha", "sdpa"])
def test_attention_is_one_graph(name):
    """Captured without a graph break; aot_eager stops before code generation."""
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


def test_switching_backends_shares_the_weights(model):
    weights = {name: weight.clone() for name, weight in model.unet.state_dict().items()}
    before = images_of(model)
    model.optimise(Optimisations(attention="mha"))
    attention = model.unet.transformer_blocks()[0].attn2
    pointer = attention.mha.k_proj_weight.data_ptr()
    model.optimise(Optimisations(attention="original"))
    assert model.unet.transformer_blocks()[0].attn2.to_k.weight.data_ptr() == pointer
    assert all(torch.equal(weight, weights[name]) for name, weight in model.unet.state_dict().items())
    assert torch.equal(images_of(model), before)


@pytest.mark.slow
def test_kernels_are_recorded_for_both_networks(model):
    images_of(model)
    assert model.kernels == {"unet": ("softmax",), "autoencoder": ("softmax",)}
    if has("cpu_flash"):
        for kernel in ("math", "flash"):
            model.optimise(Optimisations(attention="sdpa", sdpa_kernels=(kernel,)))
            images_of(model)
            assert model.kernels == {"unet": (kernel,), "autoencoder": (kernel,)}


def test_vae_reports_its_fallback(model):
    """xFormers on a CPU supports head sizes up to 32; the VAE's is 48."""
    optimise_or_skip(model, Optimisations(attention="xformers"))
    images_of(model)
    assert model.kernels["unet"] == ("small_k",)
    fallback = model.autoencoder.attention.implementation
    assert fallback == ("sdpa" if has("sdpa") else "original") and model.kernels["autoencoder"]
