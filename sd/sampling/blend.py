"""Inpainting with a text-to-image model: the region outside the mask is replaced after each step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blend:
    """Replacement of the region outside a mask by the original image at the noise level of the next step.

    mask: bool [1, 1, h, w], True where x stays. latents: of the original image [B, 4, h, w]; noise: unit Gaussian of that
    shape, the same at every step. Source: RePaint without resampling (arXiv 2201.09865), diffusers' legacy inpainting.
    """

    mask: Tensor
    latents: Tensor
    noise: Tensor

    def noised(self, alpha: float, c_in: float = 1.0) -> Tensor:
        """The original image as x of an evaluation: (alpha latents + sqrt(1 - alpha^2) noise) / c_in."""
        sigma = (1 - alpha**2) ** 0.5
        return torch.add(alpha / c_in * self.latents, self.noise, alpha=sigma / c_in)

    def __call__(self, x: Tensor, alpha: float, c_in: float = 1.0) -> Tensor:
        """x [B, 4, h, w] with the original image outside the mask."""
        return torch.where(self.mask, x, self.noised(alpha, c_in))
