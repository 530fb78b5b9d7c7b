"""Where random numbers come from: per image, so that a picture is the same at any batch size, or as the original drew."""

from __future__ import annotations

import torch

from sd.choices import RNGS
from sd.errors import ConfigError


class PerImageNoise:
    """One CPU generator per image, seeded seed + i: image i is the same at any batch size and on any device."""

    def __init__(self, seed: int, batch: int):
        self.generators = [torch.Generator().manual_seed(seed + i) for i in range(batch)]

    @classmethod
    def from_generators(cls, generators: list[torch.Generator]) -> PerImageNoise:
        """Draw image i from generators[i]; entries may be the same generator, which then draws for its images in turn."""
        source = cls(0, 0)
        source.generators = generators
        return source

    def initial(self, shape, device):
        """x_T [B, ...] float32 on `device`."""
        return torch.stack([torch.randn(shape[1:], generator=g) for g in self.generators]).to(device)

    def step(self, x, used: bool):
        """One sampler step's noise, like x; None where its factor is 0."""
        return self.initial(x.shape, x.device) if used else None

    def steps(self, x, used: list[bool]):
        """The noise of many steps in their order [steps, B, ...], copied to x's device at once; None where all are unused."""
        if not any(used):
            return None
        blank = torch.zeros(x.shape)
        return torch.stack([self.initial(x.shape, "cpu") if one else blank for one in used]).to(x.device)

    def posterior(self, shape, device):
        """Noise of the autoencoder's posterior, for img2img."""
        return self.initial(shape, device)


class OriginalNoise:
    """The draws of the original scripts, in their order, after seed_everything(seed): one for the whole batch on the device.

    The original DDIM draws once a step and PLMS once per UNet call even where the noise is multiplied by 0, so a second
    iteration depends on it; DPM-Solver draws nothing. The posterior is drawn on the CPU (compatibility with
    Stability-AI's distributions.py). On a CPU the original seeds before it builds the model, whose random
    initialisation then consumes draws: that is not reproduced. Keep one object over all iterations of a script.
    """

    def __init__(self, seed: int, device):
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        # On a CPU there is one generator for everything.
        self.cpu = self.generator if self.device.type == "cpu" else torch.Generator().manual_seed(seed)

    def initial(self, shape, device=None):
        """x_T [B, ...] float32 on the device."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def step(self, x, used: bool):
        """One sampler step's noise: drawn whether it is used or not."""
        return self.initial(x.shape)

    def steps(self, x, used: list[bool]):
        """The noise of many steps in their order [steps, B, ...]: drawn whether it is used or not; None if it is not."""
        drawn = [self.initial(x.shape) for _ in used]
        return torch.stack(drawn) if any(used) else None

    def posterior(self, shape, device=None):
        """Noise of the autoencoder's posterior, drawn on the CPU."""
        return torch.randn(shape, generator=self.cpu).to(self.device)


def noise_source(rng, seed: int, batch: int, device):
    """The source named by `rng` ("per-image" or "original"), or `rng` itself if it is a source already."""
    if isinstance(rng, (PerImageNoise, OriginalNoise)):
        return rng
    if rng == "per-image":
        return PerImageNoise(seed, batch)
    if rng == "original":
        return OriginalNoise(seed, device)
    raise ConfigError(f"rng {rng!r}: choose one of {', '.join(RNGS)}")
