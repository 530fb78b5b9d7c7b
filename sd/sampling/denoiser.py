"""Classifier-free guidance and v-to-eps conversion."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sd.attention.modules import ProjectedContext


def predict_noise(
    unet: Callable[..., Tensor],
    x: Tensor,
    timesteps: Tensor,
    context: Tensor | ProjectedContext,
    guidance: float | Tensor | None,
    alpha_sigma: tuple[float | Tensor, float | Tensor] | None,
    condition: Tensor | None = None,
    shared: bool = False,
) -> Tensor:
    """Noise prediction (eps) for x [B, 4, h, w] float32: float32 of the same shape.

    guidance: scale of classifier-free guidance (arXiv 2207.12598), for which `context` holds the unconditional half
    first, or None without guidance. alpha_sigma: (alpha, sigma) of x = alpha x_0 + sigma noise for a UNet that predicts v,
    None for a UNet that predicts eps. Scalars may be 0-dim tensors on x's device. condition: further input channels of the
    UNet [B, C, h, w], the same for both halves. shared: whether the UNet takes x once for both halves of the context.
    """
    inputs = x if condition is None else torch.cat([x, condition], dim=1)
    if guidance is None:
        out = unet(inputs, timesteps, context)
    else:
        inputs = inputs if shared else torch.cat([inputs, inputs])
        unconditional, conditional = unet(inputs, timesteps, context).chunk(2)
        out = unconditional + guidance * (conditional - unconditional)
    out = out.float()
    if alpha_sigma is not None:  # v = alpha noise - sigma x_0 (arXiv 2202.00512)
        alpha, sigma = alpha_sigma
        out = alpha * out + sigma * x
    return out


class Denoiser:
    """Guided noise prediction for a batch of prompts.

    unet: callable (x [N, 4, h, w], timesteps [N], context [N, T, C]) -> [N, 4, h, w]. context, unconditional:
    [B, T, C], concatenated once; without `unconditional`, or at scale 1, the unconditional half is not computed.
    The attributes `context` and `time_table` may then be replaced by precomputed values: see sd.models.unet.UNet.forward.
    condition: further input channels of the UNet [B, C, h, w], such as mask and masked image of an inpainting model. shared:
    whether `unet` takes x [B, 4, h, w] once for both halves of the context, as sd.models.unet.UNet does.
    """

    def __init__(
        self,
        unet: Callable[..., Tensor],
        context: Tensor,
        unconditional: Tensor | None = None,
        scale: float = 1.0,
        parameterization: str = "eps",
        condition: Tensor | None = None,
        shared: bool = False,
    ):
        self.unet, self.condition = unet, condition
        self.guidance: float | None = None
        self.context: Tensor | ProjectedContext = context
        if unconditional is not None and scale != 1.0:
            self.guidance, self.context = scale, torch.cat([unconditional, context])
        self.shared = shared and self.guidance is not None
        self.predicts_v = parameterization == "v"
        self.time_table: Tensor | None = None  # rows of UNet.time_table at the timesteps `times`
        self.times: Sequence[float] = []

    def with_tensors(
        self, context: Tensor | ProjectedContext, time_table: Tensor | None, condition: Tensor | None
    ) -> Denoiser:
        """A copy with another context, time table and condition of the same shapes."""
        other = copy.copy(self)
        other.context, other.time_table, other.condition = context, time_table, condition
        return other

    def timesteps(self, t: float, x: Tensor) -> Tensor:
        """The UNet's argument for timestep t of x: a row of the time table, or float32 of its batch, filled on the device."""
        if self.time_table is not None:
            row = self.times.index(t)
            return self.time_table[row : row + 1]
        count = 1 if self.shared else len(x) * (1 if self.guidance is None else 2)
        return torch.full((count,), float(t), device=x.device)

    def __call__(self, x: Tensor, t: float, alpha: float) -> Tensor:
        """Noise prediction for x [B, 4, h, w] float32 = alpha x_0 + sqrt(1 - alpha^2) noise at timestep t: float32, like x."""
        alpha_sigma = (alpha, math.sqrt(1 - alpha**2)) if self.predicts_v else None
        timesteps = self.timesteps(t, x)
        settings = self.guidance, alpha_sigma, self.condition, self.shared
        return predict_noise(self.unet, x, timesteps, self.context, *settings)
