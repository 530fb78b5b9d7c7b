"""Noise schedule of the forward process and the timesteps that samplers visit. All tables are float64."""

from __future__ import annotations

import bisect
import math

import torch

from sd.config.presets import ScheduleConfig
from sd.errors import ConfigError


class Schedule:
    """Noise schedule x_t = alpha_t x_0 + sqrt(1 - alpha_t^2) noise (DDPM, arXiv 2006.11239).

    alphas_cumprod: float64 tensor [timesteps] of alpha_t^2 on the CPU.
    """

    def __init__(self, config: ScheduleConfig = ScheduleConfig()):
        root = torch.linspace(config.linear_start**0.5, config.linear_end**0.5, config.timesteps, dtype=torch.float64)
        self.alphas_cumprod = torch.cumprod(1.0 - root**2, dim=0)
        self._log_alphas: list[float] = (0.5 * torch.log(self.alphas_cumprod)).tolist()
        self._log_sigmas: list[float] = (0.5 * torch.log((1 - self.alphas_cumprod) / self.alphas_cumprod)).tolist()

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def alpha(self, t: float) -> float:
        """alpha_t; t may be fractional: log alpha is interpolated linearly, as in DPM-Solver."""
        return math.exp(_interpolate(self._log_alphas, t))

    def sigma(self, t: float) -> float:
        """k-diffusion's sigma, noise over signal; t may be fractional: log sigma is interpolated linearly."""
        return math.exp(_interpolate(self._log_sigmas, t))

    def timestep(self, sigma: float) -> float:
        """Inverse of `sigma`, in general fractional."""
        log_sigma = math.log(sigma)
        low = min(max(bisect.bisect_right(self._log_sigmas, log_sigma) - 1, 0), len(self) - 2)
        left, right = self._log_sigmas[low], self._log_sigmas[low + 1]
        return low + min(max((log_sigma - left) / (right - left), 0.0), 1.0)

    def uniform_timesteps(self, steps: int) -> list[int]:
        """Timesteps of the original DDIM and PLMS, ascending: 1, 1 + c, 1 + 2c, ... with c = timesteps // steps.

        When `steps` does not divide the number of timesteps the result is longer than `steps` (30 gives 31), as in the
        original. Raises ConfigError for counts whose last timestep is outside the table (3, 9, 27, 36, 37, 101 to 111, ...),
        where the original raises an IndexError.
        """
        if self._is_possible(steps):
            return list(self._uniform(steps))
        possible = [n for n in range(1, len(self) + 1) if self._is_possible(n)]
        below = max((n for n in possible if n < steps), default=None)
        above = min((n for n in possible if n > steps), default=None)
        nearest = " or ".join(str(n) for n in (below, above) if n is not None)
        raise ConfigError(f"{steps} steps cannot be spread over {len(self)} timesteps by DDIM or PLMS: use {nearest}")

    def _uniform(self, steps: int) -> range:
        return range(1, len(self) + 1, len(self) // steps)

    def _is_possible(self, steps: int) -> bool:
        return 1 <= steps <= len(self) and self._uniform(steps)[-1] < len(self)

    def linspace_timesteps(self, count: int) -> list[float]:
        """`count` evenly spaced timesteps from the last one down to 0, in general fractional."""
        last = len(self) - 1
        return [last - last * i / (count - 1) for i in range(count)] if count > 1 else [float(last)]


def _interpolate(table: list[float], t: float) -> float:
    low = min(int(t), len(table) - 2)
    return table[low] + (t - low) * (table[low + 1] - table[low])
