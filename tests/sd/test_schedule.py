"""The noise schedule and the timesteps of the samplers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from sd.errors import ConfigError
from sd.sampling.samplers import SAMPLERS
from sd.sampling.schedule import Schedule

SCHEDULE = Schedule()


@pytest.mark.parametrize("t, expected", [(0, 0.99915), (500, 0.27633268), (981, 0.0057755), (999, 0.0046600985)])
def test_alphas_cumprod(t, expected):
    assert SCHEDULE.alphas_cumprod[t].item() == pytest.approx(expected, rel=1e-5)


def test_k_diffusion_sigmas():
    assert SCHEDULE.sigma(0) == pytest.approx(0.0291672, rel=1e-5)
    assert SCHEDULE.sigma(999) == pytest.approx(14.6146412, rel=1e-6)


def test_fractional_timesteps_interpolate_log_alpha():
    between = SCHEDULE.alpha(500.25)
    assert math.log(between) == pytest.approx(
        0.75 * math.log(SCHEDULE.alpha(500)) + 0.25 * math.log(SCHEDULE.alpha(501))
    )
    assert SCHEDULE.alpha(999) ** 2 == pytest.approx(SCHEDULE.alphas_cumprod[999].item())


@pytest.mark.parametrize(
    "steps, count, last", [(7, 8, 995), (20, 20, 951), (30, 31, 991), (50, 50, 981), (1, 1, 1), (1000 // 2, 500, 999)]
)
def test_uniform_timesteps(steps, count, last):
    timesteps = SCHEDULE.uniform_timesteps(steps)
    assert len(timesteps) == count
    assert timesteps[0] == 1
    assert timesteps[-1] == last
    assert len({b - a for a, b in pairwise(timesteps)}) <= 1


IMPOSSIBLE = {3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)}


@pytest.mark.slow
def test_every_count_is_in_range_or_raises():
    for steps in range(1, 1001):
        if steps in IMPOSSIBLE:
            with pytest.raises(ConfigError):
                SCHEDULE.uniform_timesteps(steps)
        else:
            assert max(SCHEDULE.uniform_timesteps(steps)) < 1000


@pytest.mark.parametrize(
    "steps, nearest", [(27, "26 or 28"), (0, "use 1"), (-1, "use 1"), (105, "100 or 112"), (5000, "use 500")]
)
def test_impossible_count_names_the_nearest(steps, nearest):
    with pytest.raises(ConfigError, match=nearest):
        SCHEDULE.uniform_timesteps(steps)


@pytest.mark.parametrize(
    "sampler, steps, calls",
    [("plms", 50, 51), ("ddim", 50, 50), ("ddim", 30, 31), ("dpm_solver", 20, 20), ("euler", 9, 9)],
)
def test_unet_calls(sampler, steps, calls):
    assert len(SAMPLERS[sampler](SCHEDULE, steps).evaluations) == calls
