"""Interface of an engine: one configuration as a loaded model whose `round` makes one output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Output:
    """Output of one round.

    latents: float32 [B, ...], one entry per image: the final latents of txt2img, or the output of a stage; of `train`
        [1, 2 steps], the losses and then the gradient norms.
    images: uint8 [B, H, W, 3], None for a stage without images. stages: seconds by stage, empty for a stage alone.
    """

    latents: Tensor
    images: Tensor | None
    stages: dict[str, float]
    unet_calls: int


class Engine(Protocol):
    """What a worker times. Its constructor loads the model."""

    precision: str  # the precision in effect: full, autocast, fp16 or bf16
    compiles: bool  # whether torch.compile is in effect

    @property
    def config(self) -> Any:
        """Shape of the networks (sd.config.presets.ModelConfig), for FLOPs."""

    def prepare(self, seed: int) -> None:
        """Make the state from which a round starts; untimed."""

    def round(self, seed: int) -> Output:
        """One call of the workload, from prompt or input to output."""

    def kernels(self) -> dict[str, list[str]]:
        """Attention kernels that ran, by network; empty where they are not observed."""
