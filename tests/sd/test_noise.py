"""Noise: the same picture at any batch size, and the draws of the original scripts in their order."""

from __future__ import annotations

import pytest
import torch

from sd.errors import ConfigError
from sd.sampling.noise import OriginalNoise, PerImageNoise, noise_source
from sd.sampling.samplers import SAMPLERS
from sd.sampling.schedule import Schedule

SHAPE = (3, 4, 8, 8)


def test_image_i_has_the_noise_of_seed_plus_i_at_any_batch_size():
    together = PerImageNoise(5, 4)
    alone = [PerImageNoise(5 + i, 1) for i in range(4)]
    x = together.initial((4, 4, 8, 8), "cpu")
    assert torch.equal(x, torch.cat([noise.initial((1, 4, 8, 8), "cpu") for noise in alone]))
    step = together.step(x, used=True)
    assert torch.equal(step, torch.cat([noise.step(x[:1], used=True) for noise in alone]))
    assert together.step(x, used=False) is None


def test_the_noise_of_many_steps_is_that_of_one_after_the_other():
    x = torch.zeros(2, 4, 8, 8)
    at_once, one_by_one = PerImageNoise(3, 2).steps(x, [True, False, True]), PerImageNoise(3, 2)
    assert torch.equal(at_once[0], one_by_one.step(x, used=True))
    assert torch.equal(at_once[2], one_by_one.step(x, used=True))
    assert PerImageNoise(3, 2).steps(x, [False, False]) is None


def test_unknown_source():
    with pytest.raises(ConfigError, match="per-image, original"):
        noise_source("philox", 1, 1, "cpu")


def scripted(name: str, steps: int, iterations: int, eta: float):
    """The draws of a script by name: after one seed, x_T, then what its sampler consumes; returns x_T and the steps' noise."""
    torch.manual_seed(42)
    seen = []
    for _ in range(iterations):
        seen.append(torch.randn(SHAPE))
        draws = {"ddim": steps, "plms": steps + 1, "dpm_solver": 0}[name]
        noises = [torch.randn(SHAPE) for _ in range(draws)]
        if eta:
            seen.extend(noises)
    return seen


@pytest.mark.parametrize("name, eta", [("ddim", 0.0), ("ddim", 1.0), ("plms", 0.0), ("dpm_solver", 0.0)])
def test_original_draws_over_two_iterations(name, eta):
    """Bit for bit, the second iteration included: its x_T depends on what the sampler drew, used or not."""
    noise, used = OriginalNoise(42, "cpu"), []
    plan = SAMPLERS[name](Schedule(), 20, eta)
    for _ in range(2):
        x = noise.initial(SHAPE)
        used.append(x)
        drawn = plan.noises(noise, x)
        assert (drawn is None) == (eta == 0)
        used.extend(drawn if eta else [])
    expected = scripted(name, 20, 2, eta)
    assert len(used) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(used, expected))


def test_original_img2img_draws_share_the_generator_on_a_cpu():
    torch.manual_seed(3)
    posterior, encode = torch.randn(SHAPE), torch.randn(SHAPE)
    noise = OriginalNoise(3, "cpu")
    assert torch.equal(noise.posterior(SHAPE), posterior)
    assert torch.equal(noise.initial(SHAPE), encode)


def test_no_global_state_is_touched():
    torch.manual_seed(0)
    expected = torch.randn(2)
    torch.manual_seed(0)
    OriginalNoise(1, "cpu").initial(SHAPE)
    PerImageNoise(1, 2).initial(SHAPE[:1] * 2, "cpu")
    assert torch.equal(torch.randn(2), expected)
