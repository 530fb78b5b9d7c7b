"""Samplers: every one a plan of denoiser calls with the numbers that follow, all known before the first step.

    plan = sampler("plms")(schedule, steps)
    x_0 = run(plan, denoise, x, noises)

Each is a linear multistep method, so that one update rule serves all of them (see Evaluation), in Python floats here
and as one compiled graph in sd.optimise.compile. denoise(x, t, alpha) returns the noise in x (see sd.sampling.denoiser).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sd.errors import ConfigError
from sd.sampling.schedule import Schedule

MEMORY = 4  # older quantities that an update may use: Adams-Bashforth's three, and PLMS's trial between them


@dataclass(frozen=True)
class Evaluation:
    """One call of the denoiser and the update after it.

    e = denoise(scale x, t, alpha); h_0 = kept[0] x + kept[1] e joins what was kept before, h_1, h_2, ..., newest first;
    then x becomes factor x + sum_j weights[j] h_j + spread z, with z unit noise.
    """

    t: float
    alpha: float
    factor: float
    weights: tuple[float, ...]
    scale: float = 1.0
    kept: tuple[float, float] = (0.0, 1.0)
    spread: float = 0.0
    ends_step: bool = True


@dataclass(frozen=True)
class Plan:
    """A whole run: what x_T is multiplied by, the calls, and whether the original draws noise at every call."""

    evaluations: tuple[Evaluation, ...]
    initial: float = 1.0
    draws: bool = False

    @property
    def steps(self) -> int:
        """Sampler steps, of which PLMS has one fewer than calls."""
        return sum(evaluation.ends_step for evaluation in self.evaluations)

    def noises(self, source, x):
        """Noise of all evaluations [E, B, 4, h, w] on x's device from a source of sd.sampling.noise, or None where none is used.

        Drawn before the first step, in the order of the steps: nothing has to reach the device between them.
        """
        used = [evaluation.spread > 0 for evaluation in self.evaluations]
        return source.steps(x, used) if self.draws else None


def _nothing(step: int, count: int) -> None:
    pass


def run(plan: Plan, denoise, x, noises=None, on_step=_nothing):
    """x_T [B, 4, h, w] float32, unit Gaussian noise -> x_0. noises: from `Plan.noises`. on_step(i, count) after each step.

    Waits for the device nowhere: every coefficient is a Python float, which becomes an argument of its kernel.
    """
    x = x if plan.initial == 1.0 else plan.initial * x
    history = []  # newest first
    step = 0
    for i, evaluation in enumerate(plan.evaluations):
        scaled = x if evaluation.scale == 1.0 else evaluation.scale * x
        kept = denoise(scaled, evaluation.t, evaluation.alpha)
        if evaluation.kept != (0.0, 1.0):
            kept = torch.add(evaluation.kept[0] * x, kept, alpha=evaluation.kept[1])
        history = [kept, *history[:MEMORY]]
        if evaluation.factor != 1.0:
            x = evaluation.factor * x
        for weight, past in zip(evaluation.weights, history):
            if weight:
                x = torch.add(x, past, alpha=weight)
        if evaluation.spread:
            x = torch.add(x, noises[i], alpha=evaluation.spread)
        if evaluation.ends_step:
            step += 1
            on_step(step, plan.steps)
    return x


def _levels(schedule: Schedule, timesteps: list[int]) -> list[tuple[int, float, float]]:
    """(timestep, its signal level, the next one's), descending; the last step ends at the table's first entry, not at 1."""
    alphas = [schedule.alpha(t) for t in timesteps]
    return list(zip(timesteps, alphas, [schedule.alpha(0), *alphas[:-1]]))[::-1]


def _ddim_factors(alpha: float, alpha_next: float, spread: float = 0.0) -> tuple[float, float]:
    """(of x, of e) in DDIM's step: alpha_next x_0 + sigma_next e with x_0 = (x - sigma e) / alpha."""
    factor = alpha_next / alpha
    return factor, math.sqrt(1 - alpha_next**2 - spread**2) - factor * math.sqrt(1 - alpha**2)


def ddim(schedule: Schedule, steps: int, eta: float = 0.0, timesteps=None) -> Plan:
    """DDIM (arXiv 2010.02502) on the original's timesteps; eta 1 is ancestral sampling. `timesteps` (ascending) limits it."""
    evaluations = []
    for t, alpha, alpha_next in _levels(
        schedule, schedule.uniform_timesteps(steps) if timesteps is None else timesteps
    ):
        spread = eta * math.sqrt((1 - alpha_next**2) / (1 - alpha**2) * (1 - alpha**2 / alpha_next**2))
        if spread**2 > 1 - alpha_next**2:
            raise ConfigError(f"eta {eta:g} is too large for {steps} steps: use 0 to 1")
        factor, weight = _ddim_factors(alpha, alpha_next, spread)
        evaluations.append(Evaluation(t, alpha, factor, (weight,), spread=spread))
    return Plan(tuple(evaluations), draws=True)


# Adams-Bashforth weights of the newest and older predictions, by how many older ones there are.
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(schedule: Schedule, steps: int, eta: float = 0.0) -> Plan:
    """PLMS (arXiv 2202.09778, as in CompVis/latent-diffusion): S steps, S + 1 UNet calls; the history holds raw predictions."""
    _refuse_eta("plms", eta)
    levels = _levels(schedule, schedule.uniform_timesteps(steps))
    evaluations = []
    for i, (t, alpha, alpha_next) in enumerate(levels):
        factor, weight = _ddim_factors(alpha, alpha_next)
        if i == 0:  # Heun's method: a trial step along e, then from the same x along (e + e') / 2
            evaluations.append(Evaluation(t, alpha, factor, (weight,), ends_step=False))
            t_next, level_next = levels[min(1, len(levels) - 1)][:2]
            evaluations.append(Evaluation(t_next, level_next, 1.0, (weight / 2, -weight / 2)))
            continue
        weights = [weight * part for part in ADAMS_BASHFORTH[min(i, 3)]]
        if i <= 3:
            weights.insert(i, 0.0)  # the trial's prediction e' is never used again
        evaluations.append(Evaluation(t, alpha, factor, tuple(weights)))
    return Plan(tuple(evaluations), draws=True)


def dpm_solver(schedule: Schedule, steps: int, eta: float = 0.0) -> Plan:
    """DPM-Solver++ 2M (arXiv 2211.01095), the original's settings: even times from 999 to 0, midpoint, S UNet calls."""
    _refuse_eta("dpm_solver", eta)
    if steps < 2:
        raise ConfigError("dpm_solver: a second-order multistep solver needs at least 2 steps")
    times = schedule.even_times(steps + 1)
    alphas = [schedule.alpha(t) for t in times]
    sigmas = [math.sqrt(1 - alpha**2) for alpha in alphas]
    half_log_snr = [math.log(alpha / sigma) for alpha, sigma in zip(alphas, sigmas)]
    evaluations = []
    for i in range(steps):
        h = half_log_snr[i + 1] - half_log_snr[i]
        weight = -alphas[i + 1] * math.expm1(-h)
        weights = (weight,)
        if i > 0 and (i < steps - 1 or steps >= 15):
            slope = h / (2 * (half_log_snr[i] - half_log_snr[i - 1]))
            weights = (weight * (1 + slope), -weight * slope)
        to_x0 = (1 / alphas[i], -sigmas[i] / alphas[i])
        evaluations.append(Evaluation(times[i], alphas[i], sigmas[i + 1] / sigmas[i], weights, kept=to_x0))
    return Plan(tuple(evaluations))


def euler(schedule: Schedule, steps: int, eta: float = 0.0) -> Plan:
    """Euler's method in k-diffusion's variables (arXiv 2206.00364, algorithm 2 without churn), even times, S UNet calls."""
    _refuse_eta("euler", eta)
    if steps < 1:
        raise ConfigError("euler: at least 1 step")
    times = schedule.even_times(steps)
    sigmas = [*(schedule.noise_to_signal(t) for t in times), 0.0]
    alphas = [1 / math.sqrt(1 + sigma**2) for sigma in sigmas]
    return Plan(
        tuple(
            Evaluation(t, alphas[i], 1.0, (sigmas[i + 1] - sigmas[i],), scale=alphas[i]) for i, t in enumerate(times)
        ),
        initial=sigmas[0],
    )


def _refuse_eta(name: str, eta: float) -> None:
    if eta:
        raise ConfigError(f"{name}: eta must be 0; use the ddim sampler for another")


SAMPLERS = {"ddim": ddim, "plms": plms, "dpm_solver": dpm_solver, "euler": euler}


def sampler(name: str):
    """The sampler `name`: (schedule, steps, eta) -> Plan; or a ConfigError that lists those there are."""
    try:
        return SAMPLERS[name]
    except KeyError:
        raise ConfigError(f"no sampler {name!r}: choose one of {', '.join(SAMPLERS)}") from None


def unet_calls(name: str, schedule: Schedule, steps: int) -> int:
    """UNet calls of a whole run of sampler `name`."""
    return len(SAMPLERS[name](schedule, steps).evaluations)
