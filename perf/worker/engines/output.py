"""Output of one round of an engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Output:
    """What one round made.

    latents: float32 [B, ...] on the host, one entry an image (a whole run's final latents, or a stage's output).
    images: uint8 [B, H, W, 3], None where a stage makes no picture. stages: seconds by stage, empty for a stage alone.
    unet_calls: of the round.
    """

    latents: torch.Tensor
    images: torch.Tensor | None
    stages: dict[str, float]
    unet_calls: int
