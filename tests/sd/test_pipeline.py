"""The pipeline: batches, sizes, guidance, img2img, and the pictures it refuses to return."""

from __future__ import annotations

import pytest
import torch

from sd import StableDiffusion
from sd.errors import BadImage, ConfigError
from sd.sampling.denoiser import Denoiser

PROMPT = "a green ring on a white background"


@pytest.fixture(scope="module")
def model():
    return StableDiffusion.tiny()


def _run(model, **options):
    return model.txt2img(PROMPT, **{"steps": 6, "sampler": "ddim", "scale": 4.0, **options})


def test_a_picture_does_not_depend_on_its_batch(model):
    together, alone = _run(model, seed=3, batch=4), _run(model, seed=3)
    assert (together.images[0].int() - alone.images[0].int()).abs().max() <= 1
    assert together.images.shape == (4, 64, 64, 3)
    assert set(together.seconds) == {"text", "unet", "vae"}
    assert together.unet_calls == 7  # 6 steps are 7 timesteps, since 6 does not divide 1000


def test_given_latents_replace_the_seed(model):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_run(model, seed=1, latents=latents).images, _run(model, seed=2, latents=latents).images)
    with pytest.raises(ConfigError, match="latents of shape"):
        _run(model, latents=latents[:, :3])


@pytest.mark.parametrize("height, width", [(64, 128), (128, 64)])
def test_sizes_that_are_not_square(model, height, width):
    assert _run(model, height=height, width=width).images.shape == (1, height, width, 3)


@pytest.mark.parametrize("size", [100, 32, -64])
def test_other_sizes_are_refused(model, size):
    with pytest.raises(ConfigError, match="multiple of 64"):
        _run(model, height=size)


def test_guidance_is_one_call_unconditional_half_first():
    seen = []

    def unet(x, t, context):
        seen.append(context[:, 0, 0].tolist())
        return context[:, :1, :1, None] * torch.ones_like(x)

    x, cond, uncond = torch.zeros(1, 4, 8, 8), torch.ones(1, 77, 8), torch.full((1, 77, 8), 0.5)
    assert torch.allclose(Denoiser(unet, cond, uncond, 3.0)(x, 1, 1.0), torch.tensor(0.5 + 3.0 * 0.5))
    assert torch.allclose(Denoiser(unet, cond, uncond, 1.0)(x, 1, 1.0), torch.tensor(1.0))
    assert seen == [[0.5, 1.0], [1.0]]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_img2img(model, strength):
    image = _run(model, steps=20).images[0].permute(2, 0, 1) / 127.5 - 1
    out = model.img2img(PROMPT, image, strength=strength, steps=10, scale=3.0)
    assert out.unet_calls == int(10 * strength)
    if strength == 0:  # the autoencoder there and back, with a sample of its posterior
        assert (out.images[0].float() - (image.permute(1, 2, 0) + 1) * 127.5).abs().mean() < 8


def test_img2img_refuses_another_strength(model):
    with pytest.raises(ConfigError, match="strength"):
        model.img2img(PROMPT, torch.zeros(3, 64, 64), strength=1.5)


@pytest.mark.parametrize("value, what", [(float("nan"), "not a number"), (-1.0, "all black")])
def test_bad_pictures_are_errors(monkeypatch, model, value, what):
    monkeypatch.setattr(model, "decode", lambda latents: torch.full((len(latents), 3, 64, 64), value))
    with pytest.raises(BadImage, match=what):
        _run(model, steps=1)
