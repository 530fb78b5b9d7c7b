"""The forward process as tables: alphas, signal levels and the timesteps that samplers visit. Everything in float64."""

from __future__ import annotations

import math

import torch

from sd.config.presets import ScheduleConfig
from sd.errors import ConfigError


class Schedule:
    """The noise schedule of a model: x_t = alpha x_0 + sigma noise with alpha^2 + sigma^2 = 1 (DDPM, arXiv 2006.11239).

    alphas_cumprod: float64 tensor [timesteps] of alpha^2 on the CPU.
    """

    def __init__(self, config: ScheduleConfig = ScheduleConfig()):
        root = torch.linspace(config.linear_start**0.5, config.linear_end**0.5, config.timesteps, dtype=torch.float64)
        self.alphas_cumprod = torch.cumprod(1.0 - root**2, dim=0)
        self._log_alphas = (0.5 * torch.log(self.alphas_cumprod)).tolist()
        # k-diffusion's sigma: noise over signal, for a signal of level 1.
        self._log_sigmas = (0.5 * torch.log((1 - self.alphas_cumprod) / self.alphas_cumprod)).tolist()

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def alpha(self, t: float) -> float:
        """Signal level at a timestep, which may be fractional: log alpha is interpolated linearly, as DPM-Solver does."""
        return math.exp(_interpolate(self._log_alphas, t))

    def noise_to_signal(self, t: float) -> float:
        """k-diffusion's sigma at a timestep, which may be fractional: log sigma is interpolated linearly."""
        return math.exp(_interpolate(self._log_sigmas, t))

    def uniform_timesteps(self, steps: int) -> list[int]:
        """The timesteps of the original DDIM and PLMS, ascending: 1, 1 + c, 1 + 2c, ... with c = timesteps // steps.

        When `steps` does not divide the number of timesteps there are more of them than asked for (30 gives 31), as in
        the original. Counts whose last timestep falls outside the table, where the original dies of an IndexError
        (3, 9, 27, 36, 37, 101 to 111, ...), raise ConfigError.
        """
        if 1 <= steps <= len(self):
            timesteps = self._uniform(steps)
            if timesteps[-1] < len(self):
                return list(timesteps)
        possible = [n for n in range(1, len(self) + 1) if self._uniform(n)[-1] < len(self)]
        below = max((n for n in possible if n < steps), default=None)
        above = min((n for n in possible if n > steps), default=None)
        nearest = " or ".join(str(n) for n in (below, above) if n is not None)
        raise ConfigError(f"{steps} steps cannot be spread over {len(self)} timesteps by DDIM or PLMS: use {nearest}")

    def _uniform(self, steps: int) -> range:
        return range(1, len(self) + 1, len(self) // steps)

    def even_times(self, points: int) -> list[float]:
        """`points` times from the last timestep down to 0, evenly spaced and so in general fractional."""
        last = len(self) - 1
        return [last - last * i / (points - 1) for i in range(points)] if points > 1 else [float(last)]


def _interpolate(table: list[float], t: float) -> float:
    low = min(int(t), len(table) - 2)
    return table[low] + (t - low) * (table[low + 1] - table[low])
