"""Every step of the samplers against diffusers' schedulers, with the same noise predictions and the same noise."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from sd.sampling import plan as plans
from sd.sampling.grid import lcm_grid
from sd.sampling.noise import PerImageNoise
from sd.sampling.samplers import SAMPLERS
from sd.sampling.schedule import Schedule

SCHEDULE = Schedule()
SHAPE = (2, 4, 8, 8)
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PEERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {"steps_offset": 1}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {"steps_offset": 1}),
    "heun": ("HeunDiscreteScheduler", {"steps_offset": 1}),
    "dpm_solver": ("DPMSolverMultistepScheduler", {"steps_offset": 1, "final_sigmas_type": "sigma_min"}),
    "dpm_solver_sde": ("DPMSolverMultistepScheduler", {"steps_offset": 1, "algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {"steps_offset": 1}),
    "lcm": ("LCMScheduler", {}),
}
# Step counts at which linspace timesteps are integers: between them the peers round timesteps or interpolate sigma linearly.
INTEGERS = {True: (10, 28), False: (9, 27, 37)}
CASES = [
    *(
        (name, "linspace", n)
        for name in PEERS
        if name not in ("lcm", "ddim")
        for n in INTEGERS[SAMPLERS[name].endpoint]
    ),
    *((name, "leading", n) for name in PEERS if name != "lcm" for n in (10, 20)),
    *((name, "trailing", n) for name in PEERS if name != "lcm" for n in (2, 4, 20)),
    *((name, "trailing", 1) for name in PEERS if name not in ("lcm", "dpm_solver")),
    *(("lcm", None, n) for n in (1, 2, 4, 7, 8, 50)),
]


def prediction(x, t):
    """A nonlinear noise prediction that depends on x and t, of the magnitude of noise."""
    return torch.tanh(0.7 * x + 0.3 * x.roll(1, -1)) + 0.1 * math.cos(t / 100)


def ours(plan, x, timestep=lambda t: t):
    """(x_0, the input of every denoiser call)."""
    inputs = []

    def denoise(x, t, alpha):
        inputs.append(x)
        return prediction(x, timestep(t))

    noises = plan.noises(PerImageNoise(7, len(x)), x)
    return plans.run(plan, denoise, x, None if noises is None else noises.double()), inputs


def theirs(scheduler, x, steps, plan, monkeypatch):
    """(x_0, the input of every UNet call) of a diffusers scheduler that adds the noise of our plan."""
    noises = plan.noises(PerImageNoise(7, len(x)), x)
    drawn = iter([torch.zeros_like(x)] if noises is None else noises.double())
    monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", lambda *a, **k: next(drawn), raising=False)
    scheduler.set_timesteps(steps)
    x, inputs = x * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        inputs.append(scaled)
        x = scheduler.step(prediction(scaled, t.item()), t, x).prev_sample
    return x, inputs


@pytest.fixture
def x():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def make_peer(name, spacing, **options):
    diffusers = pytest.importorskip("diffusers", reason="the extra `peers` is not installed")
    kind, settings = PEERS[name]
    spacing = {} if spacing is None else {"timestep_spacing": spacing}
    return getattr(diffusers, kind)(**{**BETAS, **settings, **spacing, **options})


def assert_same_steps(actual, expected, bound):
    (x_0, inputs), (expected_x_0, expected_inputs) = actual, expected
    assert len(inputs) == len(expected_inputs)
    scale = max(1.0, x_0.abs().max().item())
    for i, (mine, peers) in enumerate(zip([*inputs, x_0], [*expected_inputs, expected_x_0])):
        assert (mine - peers).abs().max() < bound * scale, f"differs at call {i} of {len(inputs)}"


@pytest.mark.peers
@pytest.mark.parametrize("name, spacing, steps", CASES)
def test_every_step(name, spacing, steps, x, monkeypatch):
    """The peers' tables are float32; the bound is for inputs of magnitude 1 to 15."""
    plan = SAMPLERS[name](SCHEDULE, steps, timestep_spacing=spacing)
    peer = make_peer(name, spacing)
    assert_same_steps(ours(plan, x), theirs(peer, x, steps, plan, monkeypatch), 5e-4)


@pytest.mark.peers
@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize("name", ["dpm_solver", "euler", "heun", "dpm_solver_sde", "unipc"])
def test_karras_sigmas(name, steps, x, monkeypatch):
    """DPM-Solver's and UniPC's peers round the timesteps of Karras sigmas for the UNet."""
    plan = SAMPLERS[name](SCHEDULE, steps, sigmas="karras")
    peer = make_peer(
        name, "linspace", use_karras_sigmas=True, **({"final_sigmas_type": "zero"} if name == "dpm_solver" else {})
    )
    timestep = (lambda t: t) if SAMPLERS[name].endpoint else round
    assert_same_steps(ours(plan, x, timestep), theirs(peer, x, steps, plan, monkeypatch), 1e-3)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["ddim", "euler", "euler_ancestral", "heun", "dpm_solver", "dpm_solver_sde", "unipc"])
def test_from_an_image(name, x, monkeypatch):
    """img2img: the last steps of the grid, from an image with the noise of the first of them."""
    steps, strength = 20, 0.3
    plan = SAMPLERS[name](SCHEDULE, steps, timestep_spacing="trailing", strength=strength)
    peer, image = make_peer(name, "trailing"), torch.full(SHAPE, 0.5, dtype=torch.float64)
    peer.set_timesteps(steps)
    start = (steps - int(steps * strength)) * peer.order
    peer.set_begin_index(start) if hasattr(peer, "set_begin_index") else None
    timesteps = peer.timesteps[start:]
    assert timesteps[0].item() == plan.evaluations[0].t
    noised = peer.add_noise(image, x, timesteps[:1].repeat(len(x)))
    alpha = plan.evaluations[0].alpha
    x_0, _ = ours(plan, alpha * image + math.sqrt(1 - alpha**2) * x)

    noises = plan.noises(PerImageNoise(7, len(x)), x)
    drawn = iter([torch.zeros_like(x)] if noises is None else noises.double())
    monkeypatch.setattr(f"{type(peer).__module__}.randn_tensor", lambda *a, **k: next(drawn), raising=False)
    for t in timesteps:
        scaled = peer.scale_model_input(noised, t)
        noised = peer.step(prediction(scaled, t.item()), t, noised).prev_sample
    assert (x_0 - noised).abs().max() < 5e-4


def test_turbo_timesteps():
    """The two published definitions of SD-Turbo's steps."""
    for steps, expected in ((1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])):
        assert [e.t for e in SAMPLERS["euler"](SCHEDULE, steps, timestep_spacing="trailing").evaluations] == expected
    plan = SAMPLERS["euler_ancestral"](SCHEDULE, 4, timestep_spacing="sgm_turbo")
    assert [e.t for e in plan.evaluations] == [999, 899, 799, 699]
    assert plan.init_noise_sigma == pytest.approx(math.sqrt(1 + SCHEDULE.sigma(999) ** 2))
    assert [e.sigma_up > 0 for e in plan.evaluations] == [True, True, True, False]


def test_sgm_turbo_steps(x):
    """Written out after generative-models' EulerAncestralSampler over the sigmas at 0, 100, 200, 300 of 1000, then 0."""
    plan = SAMPLERS["euler_ancestral"](SCHEDULE, 4, timestep_spacing="sgm_turbo")
    actual, _ = ours(plan, x)
    sigmas = [((1 - a) / a).sqrt().item() for a in SCHEDULE.alphas_cumprod[[999, 899, 799, 699]]] + [0.0]
    noises = plan.noises(PerImageNoise(7, len(x)), x).double()
    expected = x * math.sqrt(1.0 + sigmas[0] ** 2)
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = expected - sigma * prediction(expected / math.sqrt(sigma**2 + 1), 999 - 100 * i)
        up = min(following, (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5)
        down = (following**2 - up**2) ** 0.5
        expected = expected + (expected - denoised) / sigma * (down - sigma)
        if following > 0:
            expected = expected + noises[i] * up
    assert (actual - expected).abs().max() < 1e-9


@pytest.mark.parametrize("steps", range(1, 51))
def test_lcm_timesteps(steps):
    """The formula of the reference, with its numpy rounding."""
    origin = (np.arange(1, 51) * 20 - 1)[::-1]
    indices = np.floor(np.linspace(0, 50, steps, endpoint=False)).astype(int)
    assert list(lcm_grid(SCHEDULE, steps).timesteps) == list(origin[indices])
