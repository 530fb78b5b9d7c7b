"""Grids of sampling steps: the timesteps that a sampler visits and the noise levels between them.

Spacings as in Table 2 of arXiv 2305.08891 with the offset of Stable Diffusion; Karras sigmas from arXiv 2206.00364.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sd.choices import SIGMAS, TIMESTEP_SPACINGS
from sd.errors import ConfigError
from sd.sampling.schedule import Schedule

RHO = 7.0  # of Karras sigmas
SGM_TURBO_STEPS, SGM_TURBO_STRIDE = 4, 100  # Stability-AI/generative-models, scripts/demo/turbo.py
LCM_ORIGINAL_STEPS = 50  # of the distillation of arXiv 2310.04378


@dataclass(frozen=True)
class Grid:
    """Steps of a run from noise to image. timesteps [n]: arguments of the UNet, may be fractional.

    alphas, sigmas [n + 1]: alpha_t of x_t = alpha_t x_0 + sqrt(1 - alpha_t^2) noise, and the ratio sqrt(1 - alpha_t^2) /
    alpha_t, before each step and after the last. init_noise_sigma: standard deviation of x_T in k-diffusion's variables
    x / alpha, in which Euler's and Heun's methods work. whole: number of steps from noise, of which this may be the end.
    """

    timesteps: tuple[float, ...]
    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]
    init_noise_sigma: float
    whole: int

    def __len__(self) -> int:
        return len(self.timesteps)

    def last(self, count: int) -> Grid:
        """The last `count` steps, for x = alphas[0] image + sqrt(1 - alphas[0]^2) noise."""
        first = len(self) - count
        tail = replace(self, timesteps=self.timesteps[first:], alphas=self.alphas[first:], sigmas=self.sigmas[first:])
        return replace(tail, init_noise_sigma=1 / tail.alphas[0] if count else 1.0)


def sigma_of(alpha: float) -> float:
    """Noise over signal at signal level alpha."""
    return math.sqrt(1 - alpha**2) / alpha


def alpha_of(sigma: float) -> float:
    """Signal level at noise over signal sigma: the inverse of `sigma_of`."""
    return 1 / math.sqrt(1 + sigma**2)


def spaced_timesteps(schedule: Schedule, spacing: str, count: int, endpoint: bool) -> list[float]:
    """`count` timesteps, descending; at most as many as the schedule has.

    leading: 1, 1 + c, ... with an integer c. linspace: evenly from the last timestep, fractional. trailing: evenly from the
    last timestep, rounded, such as 999, 749, 499, 249. sgm_turbo: the first four of 999, 899, ... of SD-Turbo's own script.
    endpoint: whether the lowest timestep of leading (1) and linspace (0) is visited, or is only where the last step ends.

    Raises ConfigError for unknown spacings, and for counts of which leading and sgm_turbo have no timesteps.
    """
    total = len(schedule)
    intervals = count if endpoint else count + 1
    if spacing == "linspace":
        return schedule.linspace_timesteps(intervals)[:count]
    if spacing == "leading":
        stride = total // intervals
        timesteps = [1.0 + stride * i for i in range(intervals - count, intervals)]
        if stride < 1 or timesteps[-1] >= total:
            raise ConfigError(f"{count} steps: too many for timestep spacing leading, choose fewer or trailing")
        return timesteps[::-1]
    if spacing == "trailing":
        return [round(total - i * total / count) - 1.0 for i in range(count)]
    if spacing == "sgm_turbo":
        if count > SGM_TURBO_STEPS:
            raise ConfigError(
                f"timestep spacing sgm_turbo: has 1 to {SGM_TURBO_STEPS} steps, not {count}; use trailing"
            )
        return [total - 1.0 - SGM_TURBO_STRIDE * i for i in range(count)]
    raise ConfigError(f"timestep spacing {spacing!r}: choose one of {', '.join(TIMESTEP_SPACINGS)}")


def karras_sigmas(high: float, low: float, count: int) -> list[float]:
    """`count` sigmas from `high` down to `low`, evenly spaced in sigma^(1 / RHO) (arXiv 2206.00364, equation 5)."""
    start, end = high ** (1 / RHO), low ** (1 / RHO)
    return [(start + (end - start) * i / max(count - 1, 1)) ** RHO for i in range(count)]


def lcm_grid(schedule: Schedule, steps: int, strength: float = 1.0) -> Grid:
    """`steps` of the 50 timesteps at which the consistency model was distilled: 999, 759, 499, 259 for 4 steps.

    strength: fraction of the 50 timesteps, from the lowest, to choose from. Raises ConfigError for more steps than these.
    """
    available = int(LCM_ORIGINAL_STEPS * strength)
    if strength < 1.0 and available == 0:
        return Grid((), (1.0,), (0.0,), 1.0, steps)
    if not 1 <= steps <= available:
        raise ConfigError(f"lcm: {steps} steps of {available} timesteps; choose from 1 to {available} steps")
    stride = len(schedule) // LCM_ORIGINAL_STEPS
    timesteps = [(available - available * i // steps) * stride - 1.0 for i in range(steps)]
    alphas = (*(schedule.alpha(t) for t in timesteps), 1.0)
    return Grid(tuple(timesteps), alphas, tuple(map(sigma_of, alphas)), 1.0, steps)


def check_sigmas(sigmas: str) -> None:
    """Raise ConfigError unless `sigmas` is `schedule` or `karras`."""
    if sigmas not in SIGMAS:
        raise ConfigError(f"sigmas {sigmas!r}: choose one of {', '.join(SIGMAS)}")
