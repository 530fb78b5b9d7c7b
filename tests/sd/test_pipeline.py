"""The pipeline: batches, sizes, guidance, img2img, noise sources, devices, weights, and rejected images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import relative_error, smallest
from PIL import Image

from sd import BadImage, CheckpointError, ConfigError, Optimisations, StableDiffusion, Unavailable
from sd.attention.functions import DEFAULT_ATTENTION
from sd.features import has
from sd.sampling.denoiser import Denoiser
from sd.sampling.noise import OriginalNoise, PerImageNoise

PROMPT = "a green ring on a white background"


@pytest.fixture(scope="module")
def model():
    return StableDiffusion.tiny()


def _run(model, **options):
    return model.txt2img(PROMPT, **{"steps": 6, "sampler": "ddim", "scale": 4.0, **options})


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_image_does_not_depend_on_its_batch(model):
    together, alone = _run(model, seed=3, batch=4), _run(model, seed=3)
    assert (together.images[0].int() - alone.images[0].int()).abs().max() <= 1
    assert together.images.shape == (4, 64, 64, 3)
    assert set(together.seconds) == {"text", "unet", "vae"}
    assert together.unet_calls == 7  # 6 steps are 7 timesteps, since 6 does not divide 1000


def test_latents_replace_the_seed(model):
    latents = torch.randn(1, 4, 8, 8, generator=_generator(0))
    assert torch.equal(_run(model, seed=1, latents=latents).images, _run(model, seed=2, latents=latents).images)
    with pytest.raises(ConfigError, match="latents of shape"):
        _run(model, latents=latents[:, :3])


@pytest.mark.parametrize("height, width", [(64, 128), (128, 64)])
def test_sizes_that_are_not_square(model, height, width):
    assert _run(model, height=height, width=width).images.shape == (1, height, width, 3)


@pytest.mark.parametrize("size", [100, 32, -64, 0])
def test_other_sizes_are_refused(model, size):
    with pytest.raises(ConfigError, match="multiple of 64"):
        _run(model, height=size)


def test_guidance_is_one_call_with_the_unconditional_half_first():
    calls = []

    def unet(x, t, context):
        calls.append(context[:, 0, 0].tolist())
        return context[:, :1, :1, None] * torch.ones_like(x)

    x, cond, uncond = torch.zeros(1, 4, 8, 8), torch.ones(1, 77, 8), torch.full((1, 77, 8), 0.5)
    assert torch.allclose(Denoiser(unet, cond, uncond, 3.0)(x, 1, 1.0), torch.tensor(0.5 + 3.0 * 0.5))
    assert torch.allclose(Denoiser(unet, cond, uncond, 1.0)(x, 1, 1.0), torch.tensor(1.0))
    assert calls == [[0.5, 1.0], [1.0]]


def test_negative_prompts(model):
    assert torch.equal(_run(model, negative_prompt=None).images, _run(model, negative_prompt="").images)
    assert torch.equal(_run(model, negative_prompt=["red"]).images, _run(model, negative_prompt="red").images)
    with pytest.raises(ConfigError, match="2 negative prompts for 1 prompts"):
        _run(model, negative_prompt=["red", "blue"])


# --- img2img


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_img2img(model, strength):
    image = _run(model, steps=20).images[0].permute(2, 0, 1) / 127.5 - 1
    out = model.img2img(PROMPT, image, strength=strength, steps=10, scale=3.0)
    assert out.unet_calls == int(10 * strength)
    if strength == 0:  # the autoencoder's reconstruction, from a sample of its posterior
        assert (out.images[0].float() - (image.permute(1, 2, 0) + 1) * 127.5).abs().mean() < 8


def test_img2img_refuses_invalid_arguments(model):
    with pytest.raises(ConfigError, match="strength"):
        model.img2img(PROMPT, torch.zeros(3, 64, 64), strength=1.5)
    for image in (torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(64, 64, 3), torch.zeros(1, 3, 64, 64)):
        with pytest.raises(ConfigError, match=r"must be float \[3, H, W\] in \[-1, 1\]"):
            model.img2img(PROMPT, image)
    for pixels, message in (
        (255.0, "convert 0..255 by image / 127.5 - 1"),
        (float("nan"), "not pixels"),
        (9e9, "not pixels"),
    ):
        with pytest.raises(ConfigError, match=rf"must be in \[-1, 1\]; .*{message}"):
            model.img2img(PROMPT, torch.full((3, 64, 64), pixels))
    with pytest.raises(ConfigError, match="height 100: must be a positive multiple of 64"):
        model.img2img(PROMPT, torch.zeros(3, 100, 64))


def test_img2img_accepts_pil_images(model):
    pixels = _run(model).images[0]
    image = Image.fromarray(pixels.numpy())
    options = {"steps": 4, "negative_prompt": None}
    expected = model.img2img(PROMPT, pixels.permute(2, 0, 1).float() / 255 * 2 - 1, **options)
    assert torch.equal(model.img2img(PROMPT, image, **options).images, expected.images)
    with pytest.raises(ConfigError, match="fewer than 64 pixels a side"):
        model.img2img(PROMPT, image.resize((63, 64)))


# --- noise


def test_one_generator_per_image(model):
    for eta in (0.0, 1.0):
        result = _run(model, batch=2, eta=eta, generator=[_generator(5), _generator(6)])
        assert result.seed == [5, 6]
        assert torch.equal(result.images, _run(model, batch=2, eta=eta, seed=5).images)


def test_one_generator_for_all_images(model):
    result = _run(model, batch=2, generator=_generator(5))
    assert result.seed == 5
    latents = torch.randn(2, 4, 8, 8, generator=_generator(5))  # as diffusers draws them
    assert torch.equal(result.images, _run(model, batch=2, latents=latents).images)
    generator = _generator(5)
    first, second = _run(model, generator=generator), _run(model, generator=generator)
    assert not torch.equal(first.images, second.images)


def test_img2img_draws_from_generators(model):
    image = torch.zeros(3, 64, 64)
    expected = model.img2img(PROMPT, image, steps=4, seed=5, batch=2)
    result = model.img2img(PROMPT, image, steps=4, batch=2, generator=[_generator(5), _generator(6)])
    assert torch.equal(result.images, expected.images)


def test_invalid_generators_are_refused(model):
    with pytest.raises(ConfigError, match="1 generators for 2 images"):
        _run(model, batch=2, generator=[_generator(1)])
    for rng in ("original", PerImageNoise(1, 1)):
        with pytest.raises(ConfigError, match="cannot be combined with rng"):
            _run(model, generator=_generator(1), rng=rng)

    class OnCuda:
        device = torch.device("cuda")

    with pytest.raises(ConfigError, match="noise is drawn on the CPU"):
        _run(model, generator=[OnCuda()])


def test_seed_none_is_random_and_reported(model):
    first, second = _run(model, seed=None), _run(model, seed=None)
    assert first.seed != second.seed
    assert torch.equal(first.images, _run(model, seed=first.seed).images)
    assert _run(model, seed=3).seed == 3
    assert _run(model, rng=PerImageNoise(7, 1)).seed == [7]
    assert _run(model, rng=OriginalNoise(8, "cpu")).seed == 8


@pytest.mark.parametrize("eta", [-0.5, float("nan"), float("inf")])
def test_invalid_eta_raises(model, eta):
    with pytest.raises(ConfigError, match="must be a finite number of at least 0"):
        _run(model, eta=eta)


# --- devices and weights

CHOICES = {
    "plain": {"attention": "original"},
    "mha": {"attention": "mha"},
    "fused": {"attention": DEFAULT_ATTENTION, "fused_qkv": True, "fused_kv": True},
    "channels_last": {"channels_last": True},
    "autocast": {"precision": "autocast"},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_state_dict_is_the_same_for_all_optimisations(choice):
    expected = {name: weight.clone() for name, weight in smallest().state_dict().items()}
    model = smallest(Optimisations(**CHOICES[choice]))
    for _ in range(2):
        state = model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], weight) for name, weight in expected.items())
        model.optimise(Optimisations(attention="original"))  # separates what was joined
    names = {f"unet.{name}" for name in model.unet.state_dict()}
    names |= {f"autoencoder.{name}" for name in model.autoencoder.state_dict()}
    assert names | {f"text_encoder.{name}" for name in model.text_encoder.state_dict()} == set(expected)


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_load_state_dict_reproduces_the_images(model, choice):
    options = Optimisations(**CHOICES[choice])
    source, target = StableDiffusion.tiny(optimisations=options), StableDiffusion.random("tiny", optimisations=options)
    target.load_state_dict(model.state_dict())
    assert torch.equal(_run(target, steps=2).images, _run(source, steps=2).images)


def test_load_state_dict_refuses_other_weights():
    model, other = smallest(), smallest()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = {name: weight + 1 for name, weight in other.state_dict().items()}
    name = "unet.out.2.bias"
    for broken in (
        {key: weight for key, weight in state.items() if key != name},
        {**state, "unet.more": state[name]},
        {**state, name: state[name][:1]},
    ):
        with pytest.raises(CheckpointError, match="do not match"):
            model.load_state_dict(broken)
        assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())
    model.load_state_dict(state)
    assert torch.equal(model.unet.out[2].bias, before[name] + 1)


def test_load_state_dict_refuses_compiled_constants(monkeypatch):
    model = smallest()
    monkeypatch.setattr(model, "optimisations", Optimisations(compile="default", inductor=("freezing",)))
    with pytest.raises(ConfigError, match="keep the old weights"):
        model.load_state_dict(model.state_dict())


def test_networks_are_ordinary_modules():
    model = smallest()
    networks = (model.unet, model.autoencoder, model.text_encoder)
    assert all(isinstance(network, torch.nn.Module) and not network.training for network in networks)
    expected = [id(parameter) for network in networks for parameter in network.parameters()]
    assert [id(parameter) for parameter in model.parameters()] == expected
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_to_moves_the_networks_and_returns_the_model():
    model = smallest(Optimisations(fused_qkv=True, cache_context_kv=True))
    calls = model._calls
    assert model.to("cpu") is model and model._calls is calls
    assert model.to(torch.device("meta")) is model
    assert model.device.type == "meta" and model._calls is not calls
    tensors = [*model.parameters(), *(buffer for buffer in model.unet.buffers() if buffer is not None)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize("arguments", [(torch.float16,), ("cpu", torch.float16), (None, torch.bfloat16)])
def test_to_refuses_dtypes_by_name(arguments):
    model = smallest()
    with pytest.raises(ConfigError, match=r"dtype torch\.b?float16 is not accepted; pass precision to Optimisations"):
        model.to(*arguments)
    assert model.unet.dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available() or not has("sdpa"), reason="CUDA is available, or there is no sdpa")
def test_to_an_absent_device_leaves_the_model_unchanged():
    model = smallest()
    before = _run(model, steps=2).images
    with pytest.raises(Unavailable):
        model.to("cuda")
    assert model.device.type == "cpu"
    assert torch.equal(_run(model, steps=2).images, before)


# --- rejected images


@pytest.mark.parametrize("value, fault", [(float("nan"), "not a number"), (-1.0, "all black")])
def test_bad_images_are_errors(monkeypatch, model, value, fault):
    monkeypatch.setattr(model, "decode", lambda latents: torch.full((len(latents), 3, 64, 64), value))
    with pytest.raises(BadImage, match=fault):
        _run(model, steps=1)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_equal_prompts_are_encoded_once(model, monkeypatch, scale):
    batches, encode = [], model._calls.encode
    monkeypatch.setattr(
        model, "_calls", replace(model._calls, encode=lambda ids: batches.append(len(ids)) or encode(ids))
    )
    together = model.txt2img("a red star", batch=3, steps=2, scale=scale)
    assert set(batches) == {1}
    batches.clear()
    apart = model.txt2img(["a red star", "a red star", "a blue ring"], steps=2, scale=scale)
    assert set(batches) == {3}
    assert relative_error(apart.latents[:2], together.latents[:2]) < 1e-4
    assert relative_error(apart.latents[2], together.latents[2]) > 1e-2
