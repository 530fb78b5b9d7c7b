"""The sampling loop as the first code runs it, step by step, as a baseline: what speed-ups are measured against.

After plms.py and ddim.py of Stability-AI/stablediffusion: each step fills its coefficients from tables on the device,
which waits for the device three times, draws noise that is multiplied by 0, and joins the constant context again. The
table of frequencies made on the CPU belongs to it too (sd.models.layers.timestep_embedding). Not reproduced: activation
checkpointing around every block (Python time alone), the progress bar, and the lists of intermediate latents.
"""

from __future__ import annotations

import torch

from sd.errors import ConfigError
from sd.sampling.denoiser import noise_in
from sd.sampling.samplers import ADAMS_BASHFORTH
from sd.sampling.schedule import Schedule

SAMPLERS = ("ddim", "plms")


class OriginalDenoiser:
    """Guided noise prediction that joins its unchanging context at every call. Arguments as of sd.sampling.denoiser.Denoiser."""

    def __init__(self, unet, context, unconditional, scale: float, parameterization: str):
        self.unet, self.context, self.unconditional = unet, context, unconditional
        self.guidance = None if unconditional is None or scale == 1.0 else scale
        self.predicts_v = parameterization == "v"

    def __call__(self, x, t, tables: _Tables, index: int):
        """The noise in x [B, 4, h, w] at timestep t [B] int64, entry `index` of the tables."""
        context = self.context
        if self.guidance is not None:
            t, context = torch.cat([t] * 2), torch.cat([self.unconditional, self.context])
        # Converted by each call's own x and t, which the original's PLMS forgets: there, v models give noise.
        signal = (tables.alphas[index].sqrt(), tables.sqrt_one_minus_alphas[index]) if self.predicts_v else None
        return noise_in(self.unet, x, t, context, self.guidance, signal)


class _Tables:
    """The original's coefficients, float32 on the device, ascending in time; `alphas` are squared signal levels."""

    def __init__(self, schedule: Schedule, timesteps: list[int], eta: float, device):
        alphas = schedule.alphas_cumprod[timesteps]
        previous = schedule.alphas_cumprod[[0, *timesteps[:-1]]]
        sigmas = eta * ((1 - previous) / (1 - alphas) * (1 - alphas / previous)).sqrt()
        self.alphas, self.sigmas = alphas.float().to(device), sigmas.float().to(device)
        self.sqrt_one_minus_alphas = (1 - alphas).sqrt().float().to(device)
        self.alphas_prev = previous.tolist()  # NumPy's there, so without waiting

    def step(self, x, e, index: int, noise):
        """DDIM's step from x along the noise e [B, 4, h, w]; the coefficients become tensors [B, 1, 1, 1]."""

        def filled(value):
            # A tensor on the device is read back for this: the step's host synchronisation.
            return torch.full((len(x), 1, 1, 1), float(value), device=x.device)

        alpha, alpha_prev = filled(self.alphas[index]), filled(self.alphas_prev[index])
        sigma, sqrt_one_minus_alpha = filled(self.sigmas[index]), filled(self.sqrt_one_minus_alphas[index])
        x0 = (x - sqrt_one_minus_alpha * e) / alpha.sqrt()
        direction = (1.0 - alpha_prev - sigma**2).sqrt() * e
        return alpha_prev.sqrt() * x0 + direction + sigma * noise.step(x, used=True)


def run(name: str, denoise: OriginalDenoiser, x, schedule: Schedule, timesteps, *, noise, eta: float, on_step):
    """x_T [B, 4, h, w] -> x_0 by sampler `name`, ddim or plms, over `timesteps` (ascending).

    noise: a source of sd.sampling.noise; on_step(i, count) after each step. Raises ConfigError for samplers that the first code
    has not, or has in a package of its own (DPM-Solver).
    """
    if name not in SAMPLERS:
        raise ConfigError(
            f"original_steps: sampler {name} is not one of {', '.join(SAMPLERS)}, whose steps it reproduces"
        )
    tables, count = _Tables(schedule, timesteps, eta, x.device), len(timesteps)

    def filled(index):
        return torch.full((len(x),), timesteps[index], device=x.device, dtype=torch.long)

    history = []  # newest first
    for i, index in enumerate(reversed(range(count))):
        e = denoise(x, filled(index), tables, index)
        if name == "plms":
            history.insert(0, e)
            if i == 0:
                trial = tables.step(x, e, index, noise)
                following = max(index - 1, 0)
                e = (e + denoise(trial, filled(following), tables, following)) / 2
            else:
                e = sum(weight * past for weight, past in zip(ADAMS_BASHFORTH[min(i, 3)], history))
            del history[3:]
        x = tables.step(x, e, index, noise)
        on_step(i + 1, count)
    return x
