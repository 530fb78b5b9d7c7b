"""From a UNet to the noise in a picture: classifier-free guidance in one batched call, and eps against v, each in one place."""

from __future__ import annotations

import copy
import math

import torch


def noise_in(unet, x, timesteps, context, guidance, signal):
    """The noise in x [B, 4, h, w] float32: float32, like x.

    guidance: scale of classifier-free guidance (arXiv 2207.12598), for which `context` holds the unconditional half
    first, or None without it. signal: (alpha, sigma) of x = alpha x_0 + sigma noise where the UNet predicts v, None
    where it predicts the noise itself. Numbers may be floats or tensors of no dimension on x's device.
    """
    if guidance is None:
        out = unet(x, timesteps, context)
    else:
        unconditional, conditional = unet(torch.cat([x, x]), timesteps, context).chunk(2)
        out = unconditional + guidance * (conditional - unconditional)
    out = out.float()
    if signal is not None:  # v = alpha noise - sigma x_0 (arXiv 2202.00512)
        alpha, sigma = signal
        out = alpha * out + sigma * x
    return out


class Denoiser:
    """Guided noise prediction of one prompt batch.

    unet: callable (x [N, 4, h, w], timesteps [N], context [N, T, C]) -> [N, 4, h, w]. context, unconditional:
    [B, T, C], joined once; without `unconditional`, or at scale 1, the unconditional half is not computed.
    `context` and `time_table` may then be replaced by what the UNet computed beforehand: see sd.models.unet.UNet.forward.
    """

    def __init__(self, unet, context, unconditional=None, scale: float = 1.0, parameterization: str = "eps"):
        self.unet = unet
        guided = unconditional is not None and scale != 1.0
        self.guidance = scale if guided else None
        self.context = torch.cat([unconditional, context]) if guided else context
        self.predicts_v = parameterization == "v"
        self.time_table, self.times = None, []  # what the UNet takes in place of each of the timesteps `times`

    def over(self, context, time_table) -> Denoiser:
        """The same over other tensors of the same meaning."""
        other = copy.copy(self)
        other.context, other.time_table = context, time_table
        return other

    def timesteps(self, t: float, x):
        """What the UNet is given for timestep t of x: its row of the table, or [N] float32, filled on the device."""
        if self.time_table is not None:
            row = self.times.index(t)
            return self.time_table[row : row + 1]
        return torch.full((len(x) * (1 if self.guidance is None else 2),), float(t), device=x.device)

    def __call__(self, x, t: float, alpha: float):
        """The noise in x [B, 4, h, w] float32 = alpha x_0 + sqrt(1 - alpha^2) noise at timestep t: float32, like x."""
        signal = (alpha, math.sqrt(1 - alpha**2)) if self.predicts_v else None
        return noise_in(self.unet, x, self.timesteps(t, x), self.context, self.guidance, signal)
