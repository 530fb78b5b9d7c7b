"""StableDiffusion: the three networks together, from prompt to pixels, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sd.checkpoint.load import factories, load, materialise
from sd.choices import EMBEDDED_WEIGHTS
from sd.config.presets import ModelConfig, preset
from sd.errors import BadImage, ConfigError
from sd.features import has
from sd.models.autoencoder import Autoencoder
from sd.models.text_encoder import TextEncoder
from sd.models.tokenizer import tokenize
from sd.models.unet import UNet
from sd.optimise.apply import apply
from sd.optimise.optimisations import WEIGHT_DTYPES, Optimisations
from sd.sampling import original_loop as original
from sd.sampling.denoiser import Denoiser
from sd.sampling.noise import noise_source
from sd.sampling.samplers import Plan, ddim
from sd.sampling.samplers import sampler as sampler_named
from sd.sampling.schedule import Schedule

SIZE_MULTIPLE = 64  # pixels: heights and widths are multiples of it, as in the original


@dataclass(frozen=True)
class Result:
    """Pictures and how long their stages took.

    images: uint8 [B, H, W, 3] in host memory. latents: float32 [B, 4, H/8, W/8] on the model's device, as the sampler
    left them. seconds: by stage, `text`, `unet` (the whole sampling loop), `vae` (decoding and the copy to the host),
    and `encode` in img2img. unet_calls: how often the UNet ran.
    """

    images: torch.Tensor
    latents: torch.Tensor
    seconds: dict[str, float]
    unet_calls: int


class StableDiffusion:
    """A loaded model. Make one by `from_checkpoint`, `tiny` or `random`."""

    def __init__(
        self,
        config: ModelConfig,
        unet: UNet,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        device: torch.device | str = "cpu",
        optimisations: Optimisations = Optimisations(),
    ):
        self.config, self.device = config, torch.device(device)
        self.unet, self.autoencoder, self.text_encoder = unet, autoencoder, text_encoder
        self.schedule = Schedule(config.schedule)
        tokenize(
            [""], config.text.kind
        )  # importing the tokenizer takes seconds: part of loading, not of the first picture
        for network in (unet, autoencoder, text_encoder):
            network.eval().requires_grad_(False)
        self.optimise(optimisations)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        config: ModelConfig | str | Path | None = None,
        device: torch.device | str = "cpu",
        optimisations: Optimisations = Optimisations(),
        progress: bool | None = None,
    ) -> StableDiffusion:
        """Load a published checkpoint (.ckpt, .safetensors or a diffusers folder).

        config: a preset's name, a YAML file in the original layout, or None to tell SD1 from SD2 by the weights; whether
        SD2 weights predict eps or v is not in them, so name `sd2-v` for those. Raises CheckpointError or ConfigError.
        """
        found, states = load(Path(path), resolve_config(config), progress=progress)
        dtype = WEIGHT_DTYPES[optimisations.precision]
        networks: dict[str, Any] = {
            name: materialise(factory, states.pop(name), torch.device(device), dtype)
            for name, factory in factories(found).items()
        }
        return cls(found, device=device, optimisations=optimisations, **networks)

    @classmethod
    def tiny(
        cls, device: torch.device | str = "cpu", optimisations: Optimisations = Optimisations()
    ) -> StableDiffusion:
        """The embedded model: 64x64 pictures of coloured shapes on coloured backgrounds (see sd.tiny.train)."""
        return cls.from_checkpoint(EMBEDDED_WEIGHTS, "tiny", device, optimisations, progress=False)

    @classmethod
    def random(
        cls,
        config: ModelConfig | str = "sd2",
        seed: int = 0,
        device: torch.device | str = "cpu",
        optimisations: Optimisations = Optimisations(),
    ) -> StableDiffusion:
        """A model of full size with seeded random weights: for measuring speed, which needs no trained ones."""
        wanted = resolve_config(config) or preset("sd2")
        device = torch.device(device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            # Made where they will live if torch can; elsewhere on the CPU and moved by `optimise`.
            with device if has("device_context") else nullcontext():
                networks = UNet(wanted.unet), Autoencoder(wanted.autoencoder), TextEncoder(wanted.text)
        return cls(wanted, *networks, device, optimisations)

    def optimise(self, optimisations: Optimisations) -> None:
        """Run from now on as `optimisations` says, over the same weights. Raises Unavailable when that cannot run here."""
        self._calls = apply(self.unet, self.autoencoder, self.text_encoder, self.device, optimisations)
        self.optimisations = optimisations

    @property
    def kernels(self) -> dict[str, tuple[str, ...]]:
        """The attention kernels that really ran, by network; empty tuples until the first picture was made."""
        return self._calls.kernels

    def synchronize(self) -> None:
        """Wait for the device to finish."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Any:
        """Prompts -> context of the UNet [B, 77, C], in the dtype of the computation."""
        tokens = tokenize(prompts, self.config.text.kind).to(self.device)
        with self.optimisations.autocast(self.device):
            return self.text_encoder(tokens)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> Any:
        """latents [B, 4, h, w] as the sampler leaves them -> [B, 3, 8h, 8w] float32, in about [-1, 1]."""
        with self.optimisations.autocast(self.device):
            return self._calls.decode(latents / self.config.scale_factor)

    @torch.no_grad()
    def encode(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> Any:
        """images [B, 3, H, W] in [-1, 1] -> latents [B, 4, H/8, W/8] float32, scaled for the UNet.

        The mean of the posterior, or a sample of it when `noise`, shaped like the latents, is given.
        """
        with self.optimisations.autocast(self.device):
            mean, log_variance = self.autoencoder.encode(images.to(self.device))
        latents = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        return self.config.scale_factor * latents

    @torch.no_grad()
    def txt2img(
        self,
        prompt: str | list[str],
        steps: int = 50,
        sampler: str = "plms",
        scale: float = 7.5,
        seed: int = 1,
        batch: int = 1,
        height: int | None = None,
        width: int | None = None,
        latents: torch.Tensor | None = None,
        negative_prompt: str | list[str] = "",
        eta: float = 0.0,
        rng: Any = "per-image",
        progress: Callable[[int, int], None] | None = None,
    ) -> Result:
        """Pictures of the prompts, `batch` of each.

        sampler: `ddim`, `plms`, `dpm_solver` or `euler`. scale: guidance, 1 for none. latents [B, 4, H/8, W/8] is
        x_T, drawn from `seed` when None. height, width: pixels, multiples of 64, None for the model's own. rng:
        `per-image` (image i depends on seed + i alone), `original` (the original scripts' draws), or a source of
        sd.sampling.noise that goes on from an earlier call. progress(step, steps) is called after every step.

        Raises ConfigError for impossible options and BadImage for NaN or all-black pictures.
        """
        plan = sampler_named(sampler)(self.schedule, steps, eta)
        prompts, negatives = _prompts(prompt, negative_prompt, batch)
        shape = self.latent_shape(len(prompts), height, width)
        noise = noise_source(rng, seed, len(prompts), self.device)
        clock = _StageClock(self.device)
        with clock.stage("text"):
            contexts = self._contexts(prompts, negatives, scale)
        with clock.stage("unet"), self.optimisations.autocast(self.device):
            x = noise.initial(shape, self.device) if latents is None else self._given_latents(latents, shape)
            if self.optimisations.original_steps:
                timesteps = self.schedule.uniform_timesteps(steps)
                x = self._sample_as_original(sampler, timesteps, x, contexts, scale, noise, eta, progress)
            else:
                x = self._sample(plan, x, contexts, scale, noise, progress)
        return self._finish(x, clock, len(plan.evaluations))

    @torch.no_grad()
    def img2img(
        self,
        prompt: str | list[str],
        image: torch.Tensor,
        strength: float = 0.8,
        steps: int = 50,
        scale: float = 9.0,
        seed: int = 1,
        batch: int = 1,
        negative_prompt: str | list[str] = "",
        eta: float = 0.0,
        rng: Any = "per-image",
        progress: Callable[[int, int], None] | None = None,
    ) -> Result:
        """Pictures that start from `image` [3, H, W] in [-1, 1], noised as far as `strength` in [0, 1] says, by DDIM.

        As in the original, the noise added is that of DDIM timestep int(strength * steps) and denoising starts one
        below it; at strength 1, where the original runs out of its table, the last timestep is taken.
        """
        if not 0.0 <= strength <= 1.0:
            raise ConfigError(f"strength {strength}: must be in [0, 1]")
        prompts, negatives = _prompts(prompt, negative_prompt, batch)
        shape = self.latent_shape(len(prompts), *image.shape[1:])
        timesteps = self.schedule.uniform_timesteps(steps)
        start = int(strength * steps)
        noise = noise_source(rng, seed, len(prompts), self.device)
        clock = _StageClock(self.device)
        with clock.stage("encode"):
            latents = self.encode(image[None].expand(len(prompts), -1, -1, -1), noise.posterior(shape, self.device))
        with clock.stage("text"):
            contexts = self._contexts(prompts, negatives, scale)
        plan = ddim(self.schedule, steps, eta, timesteps[:start])
        with clock.stage("unet"), self.optimisations.autocast(self.device):
            x = latents
            if start:
                alpha = self.schedule.alpha(timesteps[min(start, len(timesteps) - 1)])
                x = alpha * latents + (1 - alpha**2) ** 0.5 * noise.initial(shape, self.device)
            if self.optimisations.original_steps:
                x = self._sample_as_original("ddim", timesteps[:start], x, contexts, scale, noise, eta, progress)
            else:
                x = self._sample(plan, x, contexts, scale, noise, progress)
        return self._finish(x, clock, len(plan.evaluations))

    def latent_shape(self, batch: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """Shape of the latents of such pictures; ConfigError for sizes that the networks cannot take."""
        height, width = height or self.config.image_size, width or self.config.image_size
        for name, size in (("height", height), ("width", width)):
            if size <= 0 or size % SIZE_MULTIPLE:
                below = size // SIZE_MULTIPLE * SIZE_MULTIPLE
                raise ConfigError(
                    f"{name} {size}: must be a positive multiple of {SIZE_MULTIPLE}, such as {max(below, SIZE_MULTIPLE)}"
                )
        factor = self.config.autoencoder.downsampling
        return batch, self.config.unet.in_channels, height // factor, width // factor

    def _contexts(self, prompts: list[str], negatives: list[str], scale: float) -> tuple[Any, Any]:
        """(of the prompts, of the negative prompts or None without guidance), each [B, 77, C]."""
        return self.encode_prompts(prompts), self.encode_prompts(negatives) if scale != 1.0 else None

    def _sample(self, plan: Plan, x: Any, contexts: tuple[Any, Any], scale: float, noise: Any, progress: Any) -> Any:
        """x_T -> x_0 by a plan, with what is constant over the run computed before it."""
        how = self.optimisations
        denoise = Denoiser(self._calls.unet_of_run(), *contexts, scale, self.config.parameterization)
        if how.cache_context_kv:
            denoise.context = self.unet.project_context(denoise.context)
        if how.cache_time_embeddings and plan.evaluations:
            denoise.times = sorted({evaluation.t for evaluation in plan.evaluations})
            denoise.time_table = self.unet.time_table(torch.tensor(denoise.times).to(self.device))
        x = x.contiguous(memory_format=how.memory_format())
        return self._calls.sample(plan, denoise, x, plan.noises(noise, x), progress or _nothing)

    def _sample_as_original(
        self,
        sampler: str,
        timesteps: Any,
        x: Any,
        contexts: tuple[Any, Any],
        scale: float,
        noise: Any,
        eta: float,
        progress: Any,
    ) -> Any:
        """x_T -> x_0 by the first code's own steps, each of which does all of its work again."""
        denoise = original.OriginalDenoiser(self._calls.unet, *contexts, scale, self.config.parameterization)
        return original.run(
            sampler, denoise, x, self.schedule, timesteps, noise=noise, eta=eta, on_step=progress or _nothing
        )

    def _given_latents(self, latents: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        if tuple(latents.shape) != shape:
            raise ConfigError(f"latents of shape {tuple(latents.shape)} were given where {shape} are needed")
        return latents.to(device=self.device, dtype=torch.float32)

    def _finish(self, x: torch.Tensor, clock: _StageClock, unet_calls: int) -> Result:
        with clock.stage("vae"):
            pixels = self.decode(x)
            good = torch.isfinite(pixels).flatten(1).all(dim=1)
            # The original truncates, others round.
            images = ((pixels + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
            good = good.cpu()
        for i, image in enumerate(images):
            if not good[i] or not image.any():
                what = "all black" if good[i] else "not a number"
                advice = "try precision full or bf16, or attention_precision fp32"
                if self.optimisations.precision == "full":  # no number of a sound model is too large for fp32
                    advice = "the guidance scale or the weights are at fault: lower the one, or take the other again"
                raise BadImage(
                    f"picture {i + 1} of {len(images)} is {what} (precision {self.optimisations.precision}, attention "
                    f"{self.optimisations.attention}): {advice}"
                )
        return Result(images, x.contiguous(), clock.seconds(), unet_calls)


def resolve_config(config: ModelConfig | str | Path | None) -> ModelConfig | None:
    """A preset's name, a path of a YAML file, a ModelConfig or None -> ModelConfig or None."""
    if config is None or isinstance(config, ModelConfig):
        return config
    if str(config).endswith((".yaml", ".yml")):
        from sd.config.yaml_reader import read_yaml

        return read_yaml(Path(config))
    return preset(str(config))


def _prompts(prompt: str | list[str], negative_prompt: str | list[str], batch: int) -> tuple[list[str], list[str]]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or batch < 1:
        raise ConfigError("at least one prompt and a batch of at least 1")
    prompts = [p for p in prompts for _ in range(batch)]
    if isinstance(negative_prompt, str):
        return prompts, [negative_prompt] * len(prompts)
    negatives = [n for n in negative_prompt for _ in range(batch)]
    if len(negatives) != len(prompts):
        raise ConfigError("as many negative prompts as prompts, or a single one")
    return prompts, negatives


def _nothing(step: int, steps: int) -> None:
    pass


class _StageClock:
    """Seconds by stage. On CUDA by events, which the device reaches on its own: no stage waits for another."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: dict[str, tuple[Any, Any]] = {}

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.marks[name] = (start, self._now())

    def seconds(self) -> dict[str, float]:
        """Stage seconds; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
            return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in self.marks.items()}
        return {name: end - start for name, (start, end) in self.marks.items()}
