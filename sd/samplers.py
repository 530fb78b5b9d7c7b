"""Samplers: plain functions over an injected denoiser, every coefficient a number known before the first step.

    sampler(denoise, x, schedule, steps, noise=..., on_step=...) -> x_0 [B, 4, h, w] float32

denoise(x, t, alpha) returns the noise in x (see sd.denoiser); x [B, 4, h, w] float32 is unit Gaussian noise;
noise is a source of sd.noise; on_step(i, count) is called after each step.
"""

from __future__ import annotations

import math

from sd.errors import ConfigError
from sd.schedule import Schedule


def _nothing(step: int, count: int) -> None:
    pass


def _ddim_step(x, e, alpha: float, alpha_next: float, spread: float = 0.0):
    """From signal level alpha to alpha_next along the noise e; `spread` is the deviation of noise to be added."""
    x0 = (x - math.sqrt(1 - alpha**2) * e) / alpha
    return alpha_next * x0 + math.sqrt(1 - alpha_next**2 - spread**2) * e


def _levels(schedule: Schedule, timesteps: list[int]) -> list[tuple[int, float, float]]:
    """(timestep, its signal level, the next one's), descending; the last step ends at the table's first entry, not at 1."""
    alphas = [schedule.alpha(t) for t in timesteps]
    return list(zip(timesteps, alphas, [schedule.alpha(0), *alphas[:-1]]))[::-1]


def ddim(denoise, x, schedule: Schedule, steps: int, *, noise, eta: float = 0.0, on_step=_nothing, timesteps=None):
    """DDIM (arXiv 2010.02502) on the original's timesteps; eta 1 is ancestral sampling. `timesteps` (ascending) limits it."""
    levels = _levels(schedule, schedule.uniform_timesteps(steps) if timesteps is None else timesteps)
    for i, (t, alpha, alpha_next) in enumerate(levels):
        e = denoise(x, t, alpha)
        spread = eta * math.sqrt((1 - alpha_next**2) / (1 - alpha**2) * (1 - alpha**2 / alpha_next**2))
        x = _ddim_step(x, e, alpha, alpha_next, spread)
        z = noise.step(x, used=spread > 0)
        if spread > 0:
            x = x + spread * z
        on_step(i + 1, len(levels))
    return x


# Adams-Bashforth weights of the newest and older predictions, by how many older ones there are.
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(denoise, x, schedule: Schedule, steps: int, *, noise, eta: float = 0.0, on_step=_nothing):
    """PLMS (arXiv 2202.09778, as in CompVis/latent-diffusion): S steps, S + 1 UNet calls; the history holds raw predictions."""
    if eta:
        raise ConfigError("plms: eta must be 0; use the ddim sampler for another")
    levels = _levels(schedule, schedule.uniform_timesteps(steps))
    history = []  # newest first
    for i, (t, alpha, alpha_next) in enumerate(levels):
        history.insert(0, denoise(x, t, alpha))
        if len(history) == 1:  # Heun's method for the first step
            trial = _ddim_step(x, history[0], alpha, alpha_next)
            noise.step(x, used=False)
            t_next, level_next = levels[min(i + 1, len(levels) - 1)][:2]
            e = (history[0] + denoise(trial, t_next, level_next)) / 2
        else:
            e = sum(weight * past for weight, past in zip(ADAMS_BASHFORTH[len(history) - 1], history))
        x = _ddim_step(x, e, alpha, alpha_next)
        noise.step(x, used=False)
        del history[3:]
        on_step(i + 1, len(levels))
    return x


def dpm_solver(denoise, x, schedule: Schedule, steps: int, *, noise, eta: float = 0.0, on_step=_nothing):
    """DPM-Solver++ 2M (arXiv 2211.01095), the original's settings: even times from 999 to 0, midpoint, S UNet calls."""
    if eta:
        raise ConfigError("dpm_solver: eta must be 0; use the ddim sampler for another")
    if steps < 2:
        raise ConfigError("dpm_solver: a second-order multistep solver needs at least 2 steps")
    times = schedule.even_times(steps + 1)
    alphas = [schedule.alpha(t) for t in times]
    sigmas = [math.sqrt(1 - alpha**2) for alpha in alphas]
    half_log_snr = [math.log(alpha / sigma) for alpha, sigma in zip(alphas, sigmas)]
    previous = None
    for i in range(steps):
        x0 = (x - sigmas[i] * denoise(x, times[i], alphas[i])) / alphas[i]
        h = half_log_snr[i + 1] - half_log_snr[i]
        first_order = previous is None or (i == steps - 1 and steps < 15)
        if first_order:
            target = x0
        else:
            ratio = (half_log_snr[i] - half_log_snr[i - 1]) / h
            target = x0 + (x0 - previous) / (2 * ratio)
        x = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * math.expm1(-h) * target
        previous = x0
        on_step(i + 1, steps)
    return x


def euler(denoise, x, schedule: Schedule, steps: int, *, noise, eta: float = 0.0, on_step=_nothing):
    """Euler's method in k-diffusion's variables (arXiv 2206.00364, algorithm 2 without churn), even times, S UNet calls."""
    if eta:
        raise ConfigError("euler: eta must be 0; use the ddim sampler for another")
    if steps < 1:
        raise ConfigError("euler: at least 1 step")
    times = schedule.even_times(steps)
    sigmas = [*(schedule.noise_to_signal(t) for t in times), 0.0]
    x = x * sigmas[0]
    for i, t in enumerate(times):
        alpha = 1 / math.sqrt(1 + sigmas[i] ** 2)
        x = x + (sigmas[i + 1] - sigmas[i]) * denoise(x * alpha, t, alpha)
        on_step(i + 1, steps)
    return x


SAMPLERS = {"ddim": ddim, "plms": plms, "dpm_solver": dpm_solver, "euler": euler}


def sampler(name: str):
    """The sampler `name`, or a ConfigError that lists those there are."""
    try:
        return SAMPLERS[name]
    except KeyError:
        raise ConfigError(f"no sampler {name!r}: choose one of {', '.join(SAMPLERS)}") from None


def unet_calls(name: str, schedule: Schedule, steps: int) -> int:
    """UNet calls of a whole run of sampler `name`."""
    if name in ("ddim", "plms"):
        return len(schedule.uniform_timesteps(steps)) + (name == "plms")
    return steps
