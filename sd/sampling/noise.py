"""Sources of random numbers: one generator per image, or the draws of the original scripts."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sd.choices import RNGS
from sd.errors import ConfigError


class PerImageNoise:
    """One CPU generator per image with seed + i: image i is the same at any batch size and on any device."""

    def __init__(self, seed: int, batch: int):
        self.generators = [torch.Generator().manual_seed(seed + i) for i in range(batch)]

    @classmethod
    def from_generators(cls, generators: list[torch.Generator]) -> PerImageNoise:
        """Draw image i from generators[i]; entries may be the same generator, which then draws for its images in turn."""
        source = cls(0, 0)
        source.generators = generators
        return source

    def initial(self, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """Unit Gaussian noise [B, ...] float32 on `device`, such as x_T."""
        return torch.stack([torch.randn(shape[1:], generator=g) for g in self.generators]).to(device)

    def steps(self, x: Tensor, used: Sequence[bool]) -> Tensor | None:
        """Noise [steps, B, ...] of all steps on x's device in one copy, drawn only where used; None if no step uses it."""
        if not any(used):
            return None
        zeros = torch.zeros(x.shape)
        return torch.stack([self.initial(x.shape, "cpu") if draws else zeros for draws in used]).to(x.device)

    def posterior(self, shape: Sequence[int], device: torch.device | str, shared: bool = False) -> Tensor:
        """Noise [B, ...] of the autoencoder's posterior, where an image is an input. shared: see OriginalNoise."""
        return self.initial(shape, device)

    def inpainting_initial(self, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """x_T of inpainting: as `initial`."""
        return self.initial(shape, device)


class OriginalNoise:
    """The draws of the original scripts after seed_everything(seed), in their order: one generator for the batch, on the device.

    The original DDIM draws once per step and PLMS once per UNet call even where the noise is multiplied by 0, and a second
    iteration depends on these draws; DPM-Solver draws nothing. The posterior is drawn on the CPU (Stability-AI's
    distributions.py). Not reproduced: the original seeds before it builds the model on the CPU, whose random initialisation
    consumes draws of the CPU's generator. Use one object for all iterations of a script.
    """

    def __init__(self, seed: int, device: torch.device | str):
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        # On a CPU all draws share one generator.
        self.cpu = self.generator if self.device.type == "cpu" else torch.Generator().manual_seed(seed)
        self.numpy: np.random.RandomState | None = None  # of inpainting alone
        self.shared_posterior: Tensor | None = None

    def initial(self, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
        """Unit Gaussian noise [B, ...] float32 on the generator's device, such as x_T; `device` is ignored."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def steps(self, x: Tensor, used: Sequence[bool]) -> Tensor | None:
        """Noise [steps, B, ...] of all steps, drawn for every step; None if no step uses it."""
        noises = [self.initial(x.shape) for _ in used]
        return torch.stack(noises) if any(used) else None

    def posterior(self, shape: Sequence[int], device: torch.device | str | None = None, shared: bool = False) -> Tensor:
        """Noise [B, ...] of the autoencoder's posterior, drawn on the CPU.

        shared: the first such draw at every call of this shape, as in img2img, whose script encodes its image before the
        iterations.
        """
        if not shared:
            return torch.randn(shape, generator=self.cpu).to(self.device)
        if self.shared_posterior is None or self.shared_posterior.shape != torch.Size(shape):
            self.shared_posterior = self.posterior(shape)
        return self.shared_posterior

    def inpainting_initial(self, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
        """x_T of inpainting, whose scripts draw it from NumPy's RandomState(seed). Raises ConfigError for seeds beyond 32 bits."""
        if self.numpy is None:
            seed = self.generator.initial_seed()
            if seed >= 2**32:
                raise ConfigError(
                    f"seed {seed}: rng original draws the initial noise with NumPy, whose seeds are below 2**32"
                )
            self.numpy = np.random.RandomState(seed)
        return torch.from_numpy(self.numpy.randn(*shape)).to(self.device, torch.float32)


NoiseSource = PerImageNoise | OriginalNoise


def chosen_noise(
    rng: str | NoiseSource,
    seed: int | None,
    generator: torch.Generator | list[torch.Generator] | None,
    batch: int,
    device: torch.device | str,
) -> tuple[NoiseSource, int | list[int]]:
    """Return the noise source of a call and the seed to report.

    rng: `per-image`, `original`, or a source. seed: None for a random one. generator: CPU generators in place of the seed,
    one for each image, or one that draws for all in turn. Raises ConfigError.
    """
    if generator is not None:
        if rng != "per-image":
            raise ConfigError("generator: cannot be combined with rng; pass one of them")
        shared = isinstance(generator, torch.Generator)
        generators = [generator] * batch if isinstance(generator, torch.Generator) else list(generator)
        if len(generators) != batch:
            raise ConfigError(f"generator: {len(generators)} generators for {batch} images; pass one for each")
        if any(g.device.type != "cpu" for g in generators):
            raise ConfigError("generator: noise is drawn on the CPU; pass torch.Generator('cpu')")
        seeds = [g.initial_seed() for g in generators]
        return PerImageNoise.from_generators(generators), seeds[0] if shared else seeds
    if isinstance(rng, PerImageNoise):
        if len(rng.generators) != batch:
            raise ConfigError(f"rng: noise of {len(rng.generators)} images for {batch}; make it for all of them")
        return rng, [g.initial_seed() for g in rng.generators]
    if isinstance(rng, OriginalNoise):
        return rng, rng.generator.initial_seed()
    seed = secrets.randbits(32) if seed is None else seed
    if rng == "per-image":
        return PerImageNoise(seed, batch), seed
    if rng == "original":
        return OriginalNoise(seed, device), seed
    raise ConfigError(f"rng {rng!r}: choose one of {', '.join(RNGS)}")
