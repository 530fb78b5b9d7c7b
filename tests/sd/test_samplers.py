"""Samplers against diffusers where the definitions agree, against an exact solution, and eps against v."""

from __future__ import annotations

import math

import pytest
import torch

from sd.errors import ConfigError
from sd.sampling import plan as plans
from sd.sampling.denoiser import Denoiser
from sd.sampling.noise import PerImageNoise
from sd.sampling.samplers import ADAMS_BASHFORTH, SAMPLERS, sampler, unipc
from sd.sampling.schedule import Schedule

SCHEDULE = Schedule()
SHAPE = (2, 4, 8, 8)


def toy(x, t):
    """A nonlinear noise prediction that depends on x and t, of the magnitude of noise."""
    return torch.tanh(0.7 * x + 0.3 * x.roll(1, -1)) + 0.1 * math.cos(t / 100)


class Calls:
    """A noise prediction that records its timesteps."""

    def __init__(self, eps=toy):
        self.eps, self.times = eps, []

    def __call__(self, x, t, alpha):
        self.times.append(t)
        return self.eps(x, t)


def run(name, denoise, steps, x, eta=0.0, **options):
    plan = SAMPLERS[name](SCHEDULE, steps, eta)
    return plans.run(plan, denoise, x, plan.noises(PerImageNoise(7, len(x)), x), **options)


@pytest.fixture
def x():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [2, 8, 20, 50])
def test_number_of_unet_calls(name, steps, x):
    denoise, progress = Calls(), []
    run(name, denoise, steps, x, on_step=lambda step, count: progress.append((step, count)))
    assert len(denoise.times) == len(SAMPLERS[name](SCHEDULE, steps).evaluations)
    assert [step for step, _ in progress] == list(range(1, progress[-1][1] + 1))


def test_plms_evaluates_the_second_timestep_twice(x):
    denoise = Calls()
    run("plms", denoise, 50, x)
    assert denoise.times[:4] == [981, 961, 961, 941]
    assert denoise.times[-1] == 1


def test_adams_bashforth_weights_integrate_polynomials():
    """The k-point rule integrates polynomials of degree k - 1 exactly over the next step."""
    for weights in ADAMS_BASHFORTH:
        for power in range(len(weights)):
            predicted = sum(weight * (-float(i)) ** power for i, weight in enumerate(weights))
            assert predicted == pytest.approx(1 / (power + 1), abs=1e-12)


@pytest.mark.parametrize("name", ["plms", "dpm_solver", "euler"])
def test_eta_raises_for_deterministic_samplers(name, x):
    with pytest.raises(ConfigError, match=f"{name}: eta"):
        run(name, Calls(), 10, x, eta=0.5)


def test_invalid_names_and_counts_raise(x):
    with pytest.raises(ConfigError, match="ddim, plms"):
        sampler("lms")
    for name, steps in (("dpm_solver", 1), ("euler", 0)):
        with pytest.raises(ConfigError, match="at least"):
            run(name, Calls(), steps, x)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("ddim", {"sigmas": "karras"}, "ddim: has no karras sigmas; choose one of dpm_solver, euler"),
        ("euler", {"sigmas": "cosine"}, "sigmas 'cosine': choose one of schedule, karras"),
        ("euler", {"timestep_spacing": "cubic"}, "timestep spacing 'cubic': choose one of leading"),
        ("lcm", {"timestep_spacing": "trailing"}, "lcm: has timesteps of its own"),
        ("lcm", {"steps": 51}, "lcm: 51 steps of 50 timesteps"),
        ("lcm", {"steps": 20, "strength": 0.3}, "choose from 1 to 15 steps"),
        ("heun", {"steps": 1001}, "heun: 1001 steps are more than the 1000 timesteps"),
        ("unipc", {"steps": 1000, "timestep_spacing": "leading"}, "too many for timestep spacing leading"),
        ("euler_ancestral", {"steps": 5, "timestep_spacing": "sgm_turbo"}, "has 1 to 4 steps, not 5; use trailing"),
    ],
)
def test_what_a_sampler_lacks_raises_by_name(name, options, message):
    with pytest.raises(ConfigError, match=message):
        sampler(name)(SCHEDULE, **{"steps": 4, **options})


@pytest.mark.parametrize("name", SAMPLERS)
def test_eps_and_v_give_the_same_trajectory(name, x):
    """v = alpha eps - sigma x_0 of the same prediction, converted with the x and t of each call."""
    x = x.float()
    context = torch.zeros(2, 77, 8)

    def coefficients(t):
        # Between integer timesteps, Euler and Heun interpolate log sigma and the others log alpha.
        t = t[0].item()
        alpha = (1 + SCHEDULE.sigma(t) ** 2) ** -0.5 if SAMPLERS[name].endpoint else SCHEDULE.alpha(t)
        return t, alpha, (1 - alpha**2) ** 0.5

    def eps_unet(x, t, context):
        return toy(x, coefficients(t)[0])

    def v_unet(x, t, context):
        t, alpha, sigma = coefficients(t)
        eps = toy(x, t)
        return alpha * eps - sigma * (x - sigma * eps) / alpha

    by_eps = run(name, Denoiser(eps_unet, context), 20, x)
    by_v = run(name, Denoiser(v_unet, context, parameterization="v"), 20, x)
    assert (by_eps - by_v).norm() < 1e-4 * by_eps.norm()


DATA_STD = 0.6  # standard deviation of the data


def gaussian_eps(x, t):
    """The exact noise prediction for data ~ N(0, DATA_STD^2)."""
    alpha = SCHEDULE.alpha(t)
    variance = alpha**2 * DATA_STD**2 + 1 - alpha**2
    return math.sqrt(1 - alpha**2) * x / variance


@pytest.mark.parametrize("name, order", [("ddim", 1), ("euler", 1), ("dpm_solver", 2), ("plms", 1), ("unipc", 1.7)])
def test_converges_to_the_exact_solution(name, order, x):
    """On Gaussian data, whose flow has a closed form, the error falls with the order-th power of the step."""

    def deviation(alpha):
        return math.sqrt(alpha**2 * DATA_STD**2 + 1 - alpha**2)

    def error(steps):
        if name == "unipc":  # to timestep 0: the first and the last step are of first order
            x0 = plans.run(unipc(SAMPLERS["dpm_solver"].grid(SCHEDULE, steps, "linspace")), Calls(gaussian_eps), x)
        else:
            x0 = run(name, Calls(gaussian_eps), steps, x)
        if name == "euler":  # from x_T = sigma_max * x to data without noise
            sigma = SCHEDULE.sigma(999)
            truth = x * sigma * DATA_STD / math.sqrt(DATA_STD**2 + sigma**2)
        else:
            first = 999 if name in ("dpm_solver", "unipc") else SCHEDULE.uniform_timesteps(steps)[-1]
            truth = x * deviation(SCHEDULE.alpha(0)) / deviation(SCHEDULE.alpha(first))
        return ((x0 - truth).norm() / truth.norm()).item()

    # Ten times the steps divide the error by 10^order in the limit.
    coarse, fine = error(50), error(500)
    assert fine < 0.006
    assert math.log10(coarse / fine) > 0.8 * order


def test_heun_is_of_second_order(x):
    """Its last step, to an image without noise, is Euler's and the same at any number of steps: differences leave it out."""

    def difference(steps):
        coarse, fine = (run("heun", Calls(gaussian_eps), n, x) for n in (steps, 2 * steps))
        return (coarse - fine).norm()

    assert difference(60) / difference(240) > 0.8 * 4**2


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
    """Equal trajectories where the definitions agree; diffusers' tables are float32."""

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
        expected = x
        for t in peer.timesteps:
            noise = source.initial(expected.shape, expected.device)
            expected = peer.step(toy(expected, t.item()), t, expected, eta=1.0, variance_noise=noise).prev_sample
        assert (run("ddim", Calls(), 20, x, eta=1.0) - expected).abs().max() < 1e-4

    @pytest.mark.parametrize(
        "steps", [9, 27, 37]
    )  # where the timesteps are integers, on both sides of the rule for < 15
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

    @pytest.mark.parametrize(
        "steps", [10, 28]
    )  # where the timesteps are integers: between them the interpolations differ
    def test_euler(self, diffusers, steps, x):
        peer = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace")
        assert (run("euler", Calls(), steps, x) - _diffusers_run(peer, x, steps, toy)).abs().max() < 1e-3
