"""From a UNet to the noise in a picture: classifier-free guidance in one batched call, and eps against v, each in one place."""

from __future__ import annotations

import torch


class Denoiser:
    """Guided noise prediction (arXiv 2207.12598) of one prompt batch.

    unet: callable (x [N, 4, h, w], timesteps [N], context [N, T, C]) -> [N, 4, h, w]. context, unconditional:
    [B, T, C]; without `unconditional`, or at scale 1, the unconditional half is not computed.
    """

    def __init__(self, unet, context, unconditional=None, scale: float = 1.0, parameterization: str = "eps"):
        self.unet = unet
        self.guided = unconditional is not None and scale != 1.0
        self.context = torch.cat([unconditional, context]) if self.guided else context
        self.scale = scale
        self.predicts_v = parameterization == "v"
        self.calls = 0

    def __call__(self, x, t: float, alpha: float):
        """The noise in x [B, 4, h, w] float32 = alpha x_0 + sqrt(1 - alpha^2) noise at timestep t: float32, like x."""
        self.calls += 1
        timesteps = torch.full((len(self.context),), float(t), device=x.device)
        if self.guided:
            unconditional, conditional = self.unet(torch.cat([x, x]), timesteps, self.context).chunk(2)
            out = unconditional + self.scale * (conditional - unconditional)
        else:
            # A CUDA graph returns its own output buffer; the guided sum above is a new tensor, this one must be made so.
            out = self.unet(x, timesteps, self.context).clone()
        out = out.float()
        if self.predicts_v:  # v = alpha noise - sigma x_0 (arXiv 2202.00512)
            out = alpha * out + (1 - alpha**2) ** 0.5 * x
        return out
