"""Noise sources: independence of the batch size, and the draws of the original scripts."""

from __future__ import annotations

import pytest
import torch

from sd.errors import ConfigError
from sd.sampling.noise import OriginalNoise, PerImageNoise, chosen_noise
from sd.sampling.samplers import SAMPLERS
from sd.sampling.schedule import Schedule

SHAPE = (3, 4, 8, 8)


def test_noise_of_image_i_depends_on_seed_plus_i_alone():
    together = PerImageNoise(5, 4)
    alone = [PerImageNoise(5 + i, 1) for i in range(4)]
    x = together.initial((4, 4, 8, 8), "cpu")
    assert torch.equal(x, torch.cat([noise.initial((1, 4, 8, 8), "cpu") for noise in alone]))
    assert together.steps(x, [False]) is None
    step = together.steps(x, [True])[0]
    assert torch.equal(step, torch.cat([noise.steps(x[:1], [True])[0] for noise in alone]))


def test_noise_of_many_steps_equals_successive_draws():
    x = torch.zeros(2, 4, 8, 8)
    noises, source = PerImageNoise(3, 2).steps(x, [True, False, True]), PerImageNoise(3, 2)
    assert torch.equal(noises[0], source.initial(x.shape, "cpu"))
    assert torch.equal(noises[2], source.initial(x.shape, "cpu"))
    assert PerImageNoise(3, 2).steps(x, [False, False]) is None


def test_the_posterior_of_img2img_is_drawn_once():
    """The original script encodes its image before the iterations, so that all later draws follow those of the first."""
    torch.manual_seed(5)
    expected = [torch.randn(SHAPE) for _ in range(3)]
    noise = OriginalNoise(5, "cpu")
    made = [
        f()
        for _ in range(2)
        for f in (lambda: noise.posterior(SHAPE, "cpu", shared=True), lambda: noise.initial(SHAPE))
    ]
    assert all(map(torch.equal, made, (expected[0], expected[1], expected[0], expected[2])))


def test_a_source_for_another_number_of_images_raises():
    with pytest.raises(ConfigError, match="rng: noise of 1 images for 2"):
        chosen_noise(PerImageNoise(7, 1), None, None, 2, "cpu")


def test_unknown_source_raises():
    with pytest.raises(ConfigError, match="per-image, original"):
        chosen_noise("philox", 1, None, 1, "cpu")


def scripted(name: str, steps: int, iterations: int, eta: float):
    """The used draws of an original script after one seed: per iteration x_T, then the noise of its sampler's steps."""
    torch.manual_seed(42)
    expected = []
    for _ in range(iterations):
        expected.append(torch.randn(SHAPE))
        draws = {"ddim": steps, "plms": steps + 1, "dpm_solver": 0}[name]
        noises = [torch.randn(SHAPE) for _ in range(draws)]
        if eta:
            expected.extend(noises)
    return expected


@pytest.mark.parametrize("name, eta", [("ddim", 0.0), ("ddim", 1.0), ("plms", 0.0), ("dpm_solver", 0.0)])
def test_original_draws_over_two_iterations(name, eta):
    """Bit for bit; x_T of the second iteration depends on every draw of the first, used or not."""
    noise, used = OriginalNoise(42, "cpu"), []
    plan = SAMPLERS[name](Schedule(), 20, eta)
    for _ in range(2):
        x = noise.initial(SHAPE)
        used.append(x)
        noises = plan.noises(noise, x)
        assert (noises is None) == (eta == 0)
        used.extend(noises if eta else [])
    expected = scripted(name, 20, 2, eta)
    assert len(used) == len(expected)
    assert all(map(torch.equal, used, expected))


def test_original_img2img_draws_share_the_generator_on_a_cpu():
    torch.manual_seed(3)
    posterior, encode = torch.randn(SHAPE), torch.randn(SHAPE)
    noise = OriginalNoise(3, "cpu")
    assert torch.equal(noise.posterior(SHAPE), posterior)
    assert torch.equal(noise.initial(SHAPE), encode)


def test_global_generator_is_unchanged():
    torch.manual_seed(0)
    expected = torch.randn(2)
    torch.manual_seed(0)
    OriginalNoise(1, "cpu").initial(SHAPE)
    PerImageNoise(1, 2).initial(SHAPE[:1] * 2, "cpu")
    assert torch.equal(torch.randn(2), expected)
