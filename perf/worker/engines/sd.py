"""What a worker times: one configuration as a loaded model with one method that makes one round's output.

An engine has `round(seed) -> Output`, `weights`, `kernels()` and `release()`; `open_engine` picks it by name.
"""

from __future__ import annotations

import functools
from dataclasses import fields

import torch

from perf.configurations.configuration import Configuration
from perf.worker.engines.output import Output
from sd import Optimisations, StableDiffusion
from sd.errors import Unavailable
from sd.sampling.noise import PerImageNoise


def optimisations(configuration: Configuration, device: str) -> Optimisations:
    """The choice as `sd` takes it. Fields at their defaults are not named, so that an older `sd` can be measured too."""
    if configuration.preset:
        return techniques(configuration.optimise, device)
    chosen = {"attention": configuration.attention, "precision": configuration.precision}
    if configuration.sdpa_kernels:
        chosen["sdpa_kernels"] = configuration.sdpa_kernels
    if configuration.compile != "none":
        chosen["compile"] = configuration.compile
    if configuration.compile_scope != "unet":
        chosen["compile_scope"] = configuration.compile_scope
    if configuration.optimise:
        named, plain = techniques(configuration.optimise, device), Optimisations()
        values = {field.name: getattr(named, field.name) for field in fields(named)}
        if configuration.compile != "none":  # an option of the compiler brings a mode where none is chosen
            del values["compile"]
        chosen.update({name: value for name, value in values.items() if value != getattr(plain, name)})
    return Optimisations(**chosen)


def techniques(names: str, device: str) -> Optimisations:
    """What `--optimise` takes. Raises Unavailable for an `sd` from before there were any."""
    try:
        from sd.optimise.presets import parse
    except ImportError:
        raise Unavailable(f"optimise {names}: this sd is older than its techniques") from None
    return parse(names, torch.device(device))


def load_model(configuration: Configuration, device: str, chosen: Optimisations) -> StableDiffusion:
    """The model of a configuration on `device`."""
    if configuration.checkpoint is not None:
        config = configuration.config or configuration.model
        return StableDiffusion.from_checkpoint(configuration.checkpoint, config, device, chosen, progress=False)
    if configuration.model == "tiny":
        return StableDiffusion.tiny(device, chosen)
    return StableDiffusion.random(configuration.model, device=device, optimisations=chosen)


class SDEngine:
    """Our own model. busy_loop: what is called after each sampler step, for tests of the gate alone."""

    def __init__(self, configuration: Configuration, device: str, busy_loop: BusyLoop | None = None):
        self.configuration, self.busy_loop = configuration, busy_loop
        self.model = load_model(configuration, device, optimisations(configuration, device))

    def round(self, seed: int) -> Output:
        """One call of what the configuration's workload names, from prompt or input to output."""
        return getattr(self, "_" + self.configuration.workload)(seed)

    def _txt2img(self, seed: int) -> Output:
        wanted = self.configuration
        if self.busy_loop:
            self.busy_loop.start()
        result = self.model.txt2img(
            wanted.prompt,
            steps=wanted.steps,
            sampler=wanted.sampler,
            scale=wanted.scale,
            seed=seed,
            batch=wanted.batch,
            height=wanted.height or None,
            width=wanted.width or None,
            progress=self.busy_loop,
        )
        return Output(result.latents, result.images, result.seconds, result.unet_calls)

    def _text(self, seed: int) -> Output:
        return Output(_by_image(self._encode()), None, {}, 0)

    def _unet(self, seed: int) -> Output:
        x = self._noise(seed)
        with torch.no_grad(), self.model.optimisations.autocast(self.model.device):
            out = self.model.unet(torch.cat([x, x]), torch.full((2 * len(x),), 501.0, device=x.device), self._context)
        return Output(_by_image(out), None, {}, 1)

    def _vae(self, seed: int) -> Output:
        return Output(self.model.decode(self._noise(seed) * self.model.config.scale_factor), None, {}, 0)

    @functools.cached_property
    def _context(self):
        return self._encode()

    def _encode(self):
        batch = self.configuration.batch
        return self.model.encode_prompts([""] * batch + [self.configuration.prompt] * batch)

    def _noise(self, seed: int):
        wanted = self.configuration
        shape = self.model.latent_shape(wanted.batch, wanted.height or None, wanted.width or None)
        return PerImageNoise(seed, wanted.batch).initial(shape, self.model.device)

    @property
    def precision(self) -> str:
        """The precision that a preset or the configuration decided on."""
        return self.model.optimisations.precision

    @property
    def compiles(self) -> bool:
        """Whether torch.compile is in it."""
        return self.model.optimisations.compile != "none"

    def kernels(self) -> dict[str, list[str]]:
        """The attention kernels that really ran, by network."""
        return {network: list(names) for network, names in self.model.kernels.items()}


def _by_image(pairs):
    """[2B, ...], the unconditional half first -> [B, 2, ...]: one entry an image."""
    return pairs.unflatten(0, (2, -1)).transpose(0, 1)


class BusyLoop:
    """A progress callback that makes each sampler step longer by a fraction of it, the processor busy all the while.

    clock: as in perf.worker.clock, waiting for the device: on a GPU a loop on the host alone would hide behind queued work.
    """

    def __init__(self, fraction: float, clock):
        self.fraction, self.clock = fraction, clock
        self.start()

    def start(self) -> None:
        """A new run begins."""
        self.last = self.clock()

    def __call__(self, step: int, steps: int) -> None:
        end = self.clock()
        end += self.fraction * (end - self.last)
        while self.clock() < end:
            pass
        self.last = self.clock()
