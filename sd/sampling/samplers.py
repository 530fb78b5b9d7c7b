"""Samplers as plans: all denoiser calls of a run with their coefficients, computed before the first step.

    plan = sampler("plms")(schedule, steps)
    x_0 = run(plan, denoise, x, plan.noises(source, x))

All are linear multistep methods with one update rule (see Evaluation), executed with Python floats here and as one
compiled graph in sd.optimise.compile. denoise(x, t, alpha) returns the noise prediction for x (see sd.sampling.denoiser).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sd.errors import ConfigError
from sd.sampling.blend import Blend
from sd.sampling.noise import NoiseSource
from sd.sampling.schedule import Schedule

HISTORY_LENGTH = 4  # older outputs that an update may use: Adams-Bashforth's three, and the trial of PLMS between them
Denoise = Callable[[Tensor, float, float], Tensor]
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """A denoiser call and the update after it, in the terms of EDM (arXiv 2206.00364) and DDIM.

    e = denoise(c_in x, t, alpha) predicts the noise; the output h_0 = c_skip x + c_out e is stored before h_1, h_2, ...,
    those of earlier calls, newest first; then x becomes c_x x + sum_j weights[j] h_j + sigma_up z with unit noise z.
    """

    t: float
    alpha: float
    c_x: float
    weights: tuple[float, ...]
    c_in: float = 1.0
    c_skip: float = 0.0
    c_out: float = 1.0
    sigma_up: float = 0.0
    ends_step: bool = True


@dataclass(frozen=True)
class Plan:
    """All denoiser calls of a run.

    init_noise_sigma: scale of x_T. draws_noise: whether the original draws noise at every call, used or not.
    """

    evaluations: tuple[Evaluation, ...]
    init_noise_sigma: float = 1.0
    draws_noise: bool = False

    @property
    def steps(self) -> int:
        """Number of sampler steps; for PLMS one fewer than denoiser calls."""
        return sum(evaluation.ends_step for evaluation in self.evaluations)

    def noise_level(self, i: int) -> tuple[float, float]:
        """(alpha, c_in) at evaluation i; (1, 1), which is no noise, after the last."""
        return (self.evaluations[i].alpha, self.evaluations[i].c_in) if i < len(self.evaluations) else (1.0, 1.0)

    def last_steps(self, count: int) -> Plan:
        """The last `count` steps, which start at x of `noise_level(0)`. Raises ConfigError for multistep samplers."""
        if count == self.steps:
            return self
        evaluations = self.evaluations[len(self.evaluations) - count :]
        if any(len(evaluation.weights) > 1 for evaluation in self.evaluations):
            raise ConfigError("a multistep sampler needs the steps before: use ddim or euler, or strength 1")
        return replace(self, evaluations=evaluations, init_noise_sigma=1.0)

    def noises(self, source: NoiseSource, x: Tensor) -> Tensor | None:
        """Noise of all evaluations [E, B, 4, h, w] on x's device, or None if none is used.

        Drawn before the first step in the order of the steps, so that no step waits for a copy to the device.
        """
        used = [evaluation.sigma_up > 0 for evaluation in self.evaluations]
        return source.steps(x, used) if self.draws_noise else None


def run(
    plan: Plan,
    denoise: Denoise,
    x: Tensor,
    noises: Tensor | None = None,
    on_step: OnStep | None = None,
    blend: Blend | None = None,
) -> Tensor:
    """x_T [B, 4, h, w] float32, unit Gaussian noise -> x_0. noises: from `Plan.noises`. on_step(i, count) after each step.

    blend: restores a part of the image after each step.

    Never synchronises with the device: every coefficient is a Python float, passed as an argument of its kernel.
    """
    x = x if plan.init_noise_sigma == 1.0 else plan.init_noise_sigma * x
    history: list[Tensor] = []  # newest first
    step = 0
    for i, evaluation in enumerate(plan.evaluations):
        scaled = x if evaluation.c_in == 1.0 else evaluation.c_in * x
        output = denoise(scaled, evaluation.t, evaluation.alpha)
        if (evaluation.c_skip, evaluation.c_out) != (0.0, 1.0):
            output = torch.add(evaluation.c_skip * x, output, alpha=evaluation.c_out)
        history = [output, *history[:HISTORY_LENGTH]]
        if evaluation.c_x != 1.0:
            x = evaluation.c_x * x
        for weight, past in zip(evaluation.weights, history):
            if weight:
                x = torch.add(x, past, alpha=weight)
        if evaluation.sigma_up:
            assert noises is not None, "this plan adds noise: pass Plan.noises"
            x = torch.add(x, noises[i], alpha=evaluation.sigma_up)
        if evaluation.ends_step:
            step += 1
            if blend is not None:
                x = blend(x, *plan.noise_level(i + 1))
            if on_step is not None:
                on_step(step, plan.steps)
    return x


def _alpha_pairs(schedule: Schedule, timesteps: Sequence[int]) -> list[tuple[int, float, float]]:
    """(t, alpha_t, alpha of the next timestep), descending; the last step ends at the alpha of timestep 0, not at 1."""
    alphas = [schedule.alpha(t) for t in timesteps]
    return list(zip(timesteps, alphas, [schedule.alpha(0), *alphas[:-1]]))[::-1]


def _ddim_coefficients(alpha: float, alpha_next: float, sigma_up: float = 0.0) -> tuple[float, float]:
    """(of x, of e) in DDIM's step: alpha_next x_0 + sigma_next e with x_0 = (x - sigma e) / alpha."""
    c_x = alpha_next / alpha
    return c_x, math.sqrt(1 - alpha_next**2 - sigma_up**2) - c_x * math.sqrt(1 - alpha**2)


def ddim(schedule: Schedule, steps: int, eta: float = 0.0, timesteps: Sequence[int] | None = None) -> Plan:
    """DDIM (arXiv 2010.02502); eta 1 is ancestral sampling. timesteps: ascending, by default the original's for `steps`.

    Raises ConfigError if eta makes the noise of a step exceed the noise level of its next timestep.
    """
    evaluations = []
    timesteps = schedule.uniform_timesteps(steps) if timesteps is None else timesteps
    for t, alpha, alpha_next in _alpha_pairs(schedule, timesteps):
        sigma_up = eta * math.sqrt((1 - alpha_next**2) / (1 - alpha**2) * (1 - alpha**2 / alpha_next**2))
        if sigma_up**2 > 1 - alpha_next**2:
            raise ConfigError(f"eta {eta:g} is too large for {steps} steps: use 0 to 1")
        c_x, weight = _ddim_coefficients(alpha, alpha_next, sigma_up)
        evaluations.append(Evaluation(t, alpha, c_x, (weight,), sigma_up=sigma_up))
    return Plan(tuple(evaluations), draws_noise=True)


# Adams-Bashforth weights, newest prediction first, by the number of older predictions.
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(schedule: Schedule, steps: int, eta: float = 0.0) -> Plan:
    """PLMS (arXiv 2202.09778, as in CompVis/latent-diffusion): S steps, S + 1 UNet calls; the history holds raw predictions."""
    _require_zero_eta("plms", eta)
    pairs = _alpha_pairs(schedule, schedule.uniform_timesteps(steps))
    evaluations = []
    for i, (t, alpha, alpha_next) in enumerate(pairs):
        c_x, weight = _ddim_coefficients(alpha, alpha_next)
        if i == 0:  # Heun's method: a trial step with e, then from the same x with (e + e') / 2
            evaluations.append(Evaluation(t, alpha, c_x, (weight,), ends_step=False))
            t_next, alpha_of_next = pairs[min(1, len(pairs) - 1)][:2]
            evaluations.append(Evaluation(t_next, alpha_of_next, 1.0, (weight / 2, -weight / 2)))
            continue
        weights = [weight * part for part in ADAMS_BASHFORTH[min(i, 3)]]
        if i <= 3:
            weights.insert(i, 0.0)  # the trial's prediction e' is not used again
        evaluations.append(Evaluation(t, alpha, c_x, tuple(weights)))
    return Plan(tuple(evaluations), draws_noise=True)


def dpm_solver(schedule: Schedule, steps: int, eta: float = 0.0) -> Plan:
    """DPM-Solver++ 2M (arXiv 2211.01095) with the original's settings: linspace timesteps, midpoint, S UNet calls."""
    _require_zero_eta("dpm_solver", eta)
    _require_few_steps("dpm_solver", schedule, steps)
    if steps < 2:
        raise ConfigError("dpm_solver: a second-order multistep solver needs at least 2 steps")
    timesteps = schedule.linspace_timesteps(steps + 1)
    alphas = [schedule.alpha(t) for t in timesteps]
    sigmas = [math.sqrt(1 - alpha**2) for alpha in alphas]
    half_log_snr = [math.log(alpha / sigma) for alpha, sigma in zip(alphas, sigmas)]
    evaluations = []
    for i in range(steps):
        h = half_log_snr[i + 1] - half_log_snr[i]
        weight = -alphas[i + 1] * math.expm1(-h)
        weights: tuple[float, ...] = (weight,)
        if i > 0 and (i < steps - 1 or steps >= 15):
            slope = h / (2 * (half_log_snr[i] - half_log_snr[i - 1]))
            weights = (weight * (1 + slope), -weight * slope)
        c_skip, c_out = 1 / alphas[i], -sigmas[i] / alphas[i]  # the output is x_0
        evaluations.append(
            Evaluation(timesteps[i], alphas[i], sigmas[i + 1] / sigmas[i], weights, c_skip=c_skip, c_out=c_out)
        )
    return Plan(tuple(evaluations))


def euler(schedule: Schedule, steps: int, eta: float = 0.0) -> Plan:
    """Euler's method in k-diffusion's variables (arXiv 2206.00364, algorithm 2 without churn), linspace timesteps, S UNet calls."""
    _require_zero_eta("euler", eta)
    _require_few_steps("euler", schedule, steps)
    if steps < 1:
        raise ConfigError("euler: at least 1 step")
    timesteps = schedule.linspace_timesteps(steps)
    sigmas = [*(schedule.sigma(t) for t in timesteps), 0.0]
    evaluations = []
    for i, t in enumerate(timesteps):
        alpha = 1 / math.sqrt(1 + sigmas[i] ** 2)
        evaluations.append(Evaluation(t, alpha, 1.0, (sigmas[i + 1] - sigmas[i],), c_in=alpha))
    return Plan(tuple(evaluations), init_noise_sigma=sigmas[0])


def _require_zero_eta(name: str, eta: float) -> None:
    if eta:
        raise ConfigError(f"{name}: eta must be 0; use the ddim sampler for another")


def _require_few_steps(name: str, schedule: Schedule, steps: int) -> None:
    if steps > len(schedule):
        raise ConfigError(
            f"{name}: {steps} steps are more than the {len(schedule)} timesteps of the noise schedule: use fewer"
        )


SAMPLERS: dict[str, Callable[..., Plan]] = {"ddim": ddim, "plms": plms, "dpm_solver": dpm_solver, "euler": euler}


def sampler(name: str) -> Callable[..., Plan]:
    """The sampler `name`: (schedule, steps, eta) -> Plan. Raises ConfigError, with the known names, for others."""
    try:
        return SAMPLERS[name]
    except KeyError:
        raise ConfigError(f"no sampler {name!r}: choose one of {', '.join(SAMPLERS)}") from None
