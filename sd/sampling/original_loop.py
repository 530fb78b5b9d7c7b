"""The sampling loop of the original code, step by step: the baseline of the measured speed-ups.

After plms.py and ddim.py of Stability-AI/stablediffusion: each step fills its coefficients from tables on the device,
which synchronises with the device three times, draws noise that is multiplied by 0, and concatenates the constant context
again. The frequencies computed on the CPU are part of it (sd.models.layers.timestep_embedding). Not reproduced: activation
checkpointing around every block (Python time only), the progress bar, and the lists of intermediate latents.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sd.errors import ConfigError
from sd.sampling.blend import Blend
from sd.sampling.denoiser import predict_noise
from sd.sampling.noise import NoiseSource
from sd.sampling.plan import OnStep
from sd.sampling.samplers import ADAMS_BASHFORTH
from sd.sampling.schedule import Schedule

SAMPLERS = ("ddim", "plms")


class OriginalDenoiser:
    """Guided noise prediction that concatenates its context at every call. Arguments as in sd.sampling.denoiser.Denoiser."""

    def __init__(
        self,
        unet: Callable[..., Tensor],
        context: Tensor,
        unconditional: Tensor | None,
        scale: float,
        parameterization: str,
        condition: Tensor | None = None,
    ):
        self.unet, self.context, self.scale, self.condition = unet, context, scale, condition
        self.unconditional = None if scale == 1.0 else unconditional
        self.predicts_v = parameterization == "v"

    def __call__(self, x: Tensor, t: Tensor, tables: _Tables, index: int) -> Tensor:
        """Noise prediction for x [B, 4, h, w] at timestep t [B] int64, entry `index` of the tables."""
        context, guidance = self.context, None
        if self.unconditional is not None:
            t, context, guidance = torch.cat([t] * 2), torch.cat([self.unconditional, context]), self.scale
        # With the x and t of this call, which the original's PLMS does not use: its v models return noise.
        alpha_sigma = None
        if self.predicts_v:
            alpha_sigma = (tables.alphas[index].sqrt(), tables.sqrt_one_minus_alphas[index])
        return predict_noise(self.unet, x, t, context, guidance, alpha_sigma, self.condition)


class _Tables:
    """The original's coefficients, float32 on the device, ascending in time; `alphas` are alpha_t^2."""

    def __init__(self, schedule: Schedule, timesteps: list[int], eta: float, device: torch.device):
        alphas = schedule.alphas_cumprod[timesteps]
        previous = schedule.alphas_cumprod[[0, *timesteps[:-1]]]
        sigmas = eta * ((1 - previous) / (1 - alphas) * (1 - alphas / previous)).sqrt()
        self.alphas, self.sigmas = alphas.float().to(device), sigmas.float().to(device)
        self.sqrt_one_minus_alphas = (1 - alphas).sqrt().float().to(device)
        self.alphas_prev: list[float] = previous.tolist()  # a NumPy array in the original, read without synchronising

    def step(self, x: Tensor, e: Tensor, index: int, noise: NoiseSource) -> Tensor:
        """DDIM step from x with the noise prediction e [B, 4, h, w]; the coefficients become tensors [B, 1, 1, 1]."""

        def filled(value: float | Tensor) -> Tensor:
            # float() reads a tensor back from the device: the host synchronisation of the step.
            return torch.full((len(x), 1, 1, 1), float(value), device=x.device)

        alpha, alpha_prev = filled(self.alphas[index]), filled(self.alphas_prev[index])
        sigma, sqrt_one_minus_alpha = filled(self.sigmas[index]), filled(self.sqrt_one_minus_alphas[index])
        x0 = (x - sqrt_one_minus_alpha * e) / alpha.sqrt()
        direction = (1.0 - alpha_prev - sigma**2).sqrt() * e
        return alpha_prev.sqrt() * x0 + direction + sigma * noise.initial(x.shape, x.device)


def run(
    name: str,
    denoise: OriginalDenoiser,
    x: Tensor,
    schedule: Schedule,
    timesteps: list[int],
    *,
    noise: NoiseSource,
    eta: float,
    on_step: OnStep,
    blend: Blend | None = None,
) -> Tensor:
    """x_T [B, 4, h, w] -> x_0 by sampler `name`, ddim or plms, over ascending `timesteps`.

    noise: a source of sd.sampling.noise; on_step(i, count) is called after each step; blend: as in
    sd.sampling.plan.run. Raises ConfigError for other samplers,
    which the original code does not have or has as a separate package (DPM-Solver).
    """
    if name not in SAMPLERS:
        raise ConfigError(
            f"original_steps: sampler {name} is not one of {', '.join(SAMPLERS)}, whose steps it reproduces"
        )
    tables, count = _Tables(schedule, timesteps, eta, x.device), len(timesteps)

    def predict(x: Tensor, index: int) -> Tensor:
        t = torch.full((len(x),), timesteps[index], device=x.device, dtype=torch.long)
        return denoise(x, t, tables, index)

    history: list[Tensor] = []  # noise predictions, newest first
    for i, index in enumerate(reversed(range(count))):
        e = predict(x, index)
        if name == "plms":
            history.insert(0, e)
            if i == 0:
                trial = tables.step(x, e, index, noise)
                e = (e + predict(trial, max(index - 1, 0))) / 2
            else:
                terms = [weight * past for weight, past in zip(ADAMS_BASHFORTH[min(i, 3)], history)]
                e = sum(terms[1:], terms[0])
            del history[3:]
        x = tables.step(x, e, index, noise)
        if blend is not None:
            x = blend(x, schedule.alpha(timesteps[index - 1]) if index else 1.0)
        on_step(i + 1, count)
    return x
