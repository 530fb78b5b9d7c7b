"""Samplers against diffusers where the definitions agree, against an exact solution, and eps against v."""

from __future__ import annotations

import math

import pytest
import torch

from sd.errors import ConfigError
from sd.sampling import samplers
from sd.sampling.denoiser import Denoiser
from sd.sampling.noise import PerImageNoise
from sd.sampling.samplers import ADAMS_BASHFORTH, SAMPLERS, sampler, unet_calls
from sd.sampling.schedule import Schedule

SCHEDULE = Schedule()
SHAPE = (2, 4, 8, 8)


def toy(x, t):
    """A prediction that depends on everything, nonlinearly, and is of the size of noise."""
    return torch.tanh(0.7 * x + 0.3 * x.roll(1, -1)) + 0.1 * math.cos(t / 100)


class Calls:
    """A denoiser of eps that counts."""

    def __init__(self, eps=toy):
        self.eps, self.times = eps, []

    def __call__(self, x, t, alpha):
        self.times.append(t)
        return self.eps(x, t)


def run(name, denoise, steps, x, eta=0.0, **options):
    plan = SAMPLERS[name](SCHEDULE, steps, eta)
    return samplers.run(plan, denoise, x, plan.noises(PerImageNoise(7, len(x)), x), **options)


@pytest.fixture
def x():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [2, 8, 20, 50])
def test_number_of_unet_calls(name, steps, x):
    denoise, seen = Calls(), []
    run(name, denoise, steps, x, on_step=lambda step, count: seen.append((step, count)))
    assert len(denoise.times) == unet_calls(name, SCHEDULE, steps)
    assert [step for step, _ in seen] == list(range(1, seen[-1][1] + 1))


def test_plms_calls_the_second_timestep_twice(x):
    denoise = Calls()
    run("plms", denoise, 50, x)
    assert denoise.times[:4] == [981, 961, 961, 941]
    assert denoise.times[-1] == 1


def test_adams_bashforth_weights_integrate_polynomials():
    """The k-point rule integrates polynomials through the points 0, -1, -2, ... exactly over one step ahead."""
    for weights in ADAMS_BASHFORTH:
        for power in range(len(weights)):
            predicted = sum(weight * (-float(i)) ** power for i, weight in enumerate(weights))
            assert predicted == pytest.approx(1 / (power + 1), abs=1e-12)


@pytest.mark.parametrize("name", ["plms", "dpm_solver", "euler"])
def test_eta_is_refused_by_name(name, x):
    with pytest.raises(ConfigError, match=f"{name}: eta"):
        run(name, Calls(), 10, x, eta=0.5)


def test_bad_names_and_counts(x):
    with pytest.raises(ConfigError, match="ddim, plms"):
        sampler("heun")
    for name, steps in (("dpm_solver", 1), ("euler", 0)):
        with pytest.raises(ConfigError, match="at least"):
            run(name, Calls(), steps, x)


@pytest.mark.parametrize("name", SAMPLERS)
def test_eps_and_v_give_the_same_trajectory(name, x):
    """v = alpha eps - sigma x_0 of the same prediction: with each call's own x and t, no sampler may differ."""
    x = x.float()
    context = torch.zeros(2, 77, 8)

    def levels(t):
        # The signal level that the sampler means: k-diffusion's interpolation differs between integer times.
        t = t[0].item()
        alpha = (1 + SCHEDULE.noise_to_signal(t) ** 2) ** -0.5 if name == "euler" else SCHEDULE.alpha(t)
        return t, alpha, (1 - alpha**2) ** 0.5

    def eps_unet(x, t, context):
        return toy(x, levels(t)[0])

    def v_unet(x, t, context):
        t, alpha, sigma = levels(t)
        eps = toy(x, t)
        return alpha * eps - sigma * (x - sigma * eps) / alpha

    by_eps = run(name, Denoiser(eps_unet, context), 20, x)
    by_v = run(name, Denoiser(v_unet, context, parameterization="v"), 20, x)
    assert (by_eps - by_v).norm() < 1e-4 * by_eps.norm()


SPREAD = 0.6  # deviation of the data


def gaussian_eps(x, t, level=SCHEDULE.alpha):
    """The exact noise prediction for data ~ N(0, SPREAD^2)."""
    alpha = level(t)
    variance = alpha**2 * SPREAD**2 + 1 - alpha**2
    return math.sqrt(1 - alpha**2) * x / variance


@pytest.mark.parametrize("name, order", [("ddim", 1), ("euler", 1), ("dpm_solver", 2), ("plms", 1)])
def test_converges_to_the_exact_solution(name, order, x):
    """Where the flow has a closed form, errors fall with the square of the step for second order, in proportion for first."""

    def deviation(alpha):
        return math.sqrt(alpha**2 * SPREAD**2 + 1 - alpha**2)

    def error(steps):
        x0 = run(name, Calls(gaussian_eps), steps, x)
        if name == "euler":  # from x_T = sigma_max * x to data without noise
            sigma = SCHEDULE.noise_to_signal(999)
            truth = x * sigma * SPREAD / math.sqrt(SPREAD**2 + sigma**2)
        else:
            first = 999 if name == "dpm_solver" else SCHEDULE.uniform_timesteps(steps)[-1]
            truth = x * deviation(SCHEDULE.alpha(0)) / deviation(SCHEDULE.alpha(first))
        return ((x0 - truth).norm() / truth.norm()).item()

    # Ten times the steps: 10^order times less error in the limit; the exponent seen is to be near it.
    coarse, fine = error(50), error(500)
    assert fine < 0.006
    assert math.log10(coarse / fine) > 0.8 * order


def _diffusers_run(scheduler, x, steps, prediction, **options):
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(prediction(scaled, t.item()), t, x, **options).prev_sample
    return x


BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.peers
class TestAgainstDiffusers:
    """The same trajectory where both define the same one; diffusers' tables are float32."""

    @pytest.fixture
    def diffusers(self):
        return pytest.importorskip("diffusers", reason="the extra `peers` is not installed")

    @pytest.mark.parametrize("steps", [10, 20, 50])
    def test_ddim(self, diffusers, steps, x):
        peer = diffusers.DDIMScheduler(
            **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"
        )
        assert (run("ddim", Calls(), steps, x) - _diffusers_run(peer, x, steps, toy)).abs().max() < 1e-4

    def test_ddim_with_noise(self, diffusers, x):
        peer = diffusers.DDIMScheduler(
            **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"
        )
        source = PerImageNoise(7, len(x))
        peer.set_timesteps(20)
        theirs = x
        for t in peer.timesteps:
            noise = source.step(theirs, used=True)
            theirs = peer.step(toy(theirs, t.item()), t, theirs, eta=1.0, variance_noise=noise).prev_sample
        assert (run("ddim", Calls(), 20, x, eta=1.0) - theirs).abs().max() < 1e-4

    @pytest.mark.parametrize("steps", [9, 27, 37])  # where even times are integers, and both sides of the rule for < 15
    def test_dpm_solver(self, diffusers, steps, x):
        peer = diffusers.DPMSolverMultistepScheduler(
            **BETAS,
            algorithm_type="dpmsolver++",
            solver_order=2,
            solver_type="midpoint",
            lower_order_final=True,
            timestep_spacing="linspace",
            final_sigmas_type="sigma_min",
        )
        assert (run("dpm_solver", Calls(), steps, x) - _diffusers_run(peer, x, steps, toy)).abs().max() < 1e-4

    @pytest.mark.parametrize("steps", [10, 28])  # where even times are integers: between them the interpolations differ
    def test_euler(self, diffusers, steps, x):
        peer = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace")
        assert (run("euler", Calls(), steps, x) - _diffusers_run(peer, x, steps, toy)).abs().max() < 1e-3
