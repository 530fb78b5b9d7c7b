"""Engine of our own model, through the public API of `sd`."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perf.worker.engines import compat
from perf.worker.engines.interface import Output
from sd import Optimisations, StableDiffusion
from sd.errors import Unavailable

LORA_MODULES = ("to_q", "to_k", "to_v", "to_out.0")  # those that diffusers' training script chooses
UNET_TIMESTEP = 501.0  # of the workload `unet`


def optimisations(configuration: Any, device: str) -> Optimisations:
    """The Optimisations of a configuration. Fields at their defaults are not passed, so that older `sd` takes the rest."""
    names = configuration.optimise
    if names.split(",")[0] in compat.OPTIMISE_PRESETS:
        return parse_techniques(names, device, configuration.model)
    chosen = {"attention": configuration.attention, "precision": configuration.precision}
    if configuration.sdpa_kernels:
        chosen["sdpa_kernels"] = tuple(configuration.sdpa_kernels)
    if configuration.compile != "none":
        chosen["compile"] = configuration.compile
    if configuration.compile_scope != "unet":
        chosen["compile_scope"] = configuration.compile_scope
    if configuration.compile_backend != "inductor":
        chosen["compile_backend"] = configuration.compile_backend
    if names:
        named, plain = parse_techniques(names, device, configuration.model), Optimisations()
        values = {field.name: getattr(named, field.name) for field in fields(named)}
        if configuration.compile != "none":  # a compiler option sets a mode only where none is chosen
            del values["compile"]
        chosen.update({name: value for name, value in values.items() if value != getattr(plain, name)})
    return Optimisations(**chosen)


def parse_techniques(names: str, device: str, model: str = "") -> Optimisations:
    """The Optimisations behind a value of `--optimise` for a model. Raises Unavailable for an `sd` older than techniques."""
    parse = compat.load("parse")
    if model.startswith("tiny") and "narrow" in inspect.signature(parse).parameters:  # older `sd` has no such preset
        return parse(names, torch.device(device), narrow=True)
    return parse(names, torch.device(device))


def load_model(configuration: Any, device: str, chosen: Optimisations) -> StableDiffusion:
    """The model of a configuration on `device`."""
    if configuration.checkpoint is not None:
        config = configuration.config or configuration.model
        return StableDiffusion.from_checkpoint(configuration.checkpoint, config, device, chosen, progress=False)
    if configuration.model == "tiny":
        return StableDiffusion.tiny(device, chosen)
    if configuration.model == "tiny-inpaint":
        return StableDiffusion.tiny(device, chosen, inpainting=True)
    return StableDiffusion.random(configuration.model, device=device, optimisations=chosen)


def load_random_lora(model: StableDiffusion, rank: int) -> None:
    """Merge a LoRA of that rank into the UNet's attention, whose updates are a tenth of the weights' standard deviation.

    Raises Unavailable for an `sd` older than LoRA.
    """
    if not hasattr(model, "load_lora"):
        raise Unavailable("this version of sd has no LoRA: it is older than that feature")
    generator, factors = torch.Generator().manual_seed(rank), {}
    for name, weight in model.state_dict().items():
        module = name[: -len(".weight")]
        if name.endswith(".weight") and module.endswith(LORA_MODULES):
            up = torch.randn(len(weight), rank, generator=generator)
            factors[f"{module}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
            factors[f"{module}.lora_B.weight"] = up * (0.1 * float(weight.float().std()) / rank**0.5)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(factors, Path(folder) / "lora.pt")
        model.load_lora(Path(folder) / "lora.pt")


def initial_latents(model: StableDiffusion, configuration: Any, seed: int) -> Tensor:
    """float32 [B, 4, h, w]: the initial noise of txt2img, image i with seed + i."""
    size = configuration.height or None, configuration.width or None
    shape = model.latent_shape(configuration.batch, *size)
    return compat.load("PerImageNoise")(seed, configuration.batch).initial(shape, model.device)


def gradient_with_hole(height: int, width: int) -> tuple[Tensor, Tensor]:
    """The input of `inpaint`: float32 image [3, H, W] in [-1, 1], a gradient in each channel, and a mask [H, W] of its middle."""
    y, x = torch.linspace(-1, 1, height)[:, None].expand(-1, width), torch.linspace(-1, 1, width).expand(height, -1)
    mask = torch.zeros(height, width)
    mask[height // 8 : -(height // 8), width // 8 : -(width // 8)] = 1
    return torch.stack([x, y, -x]), mask


class SDEngine:
    """Our own model."""

    after_step: Callable[[int, int], None] | None = None  # progress callback of each sampler step

    def __init__(self, configuration: Any):
        self.configuration, device = configuration, configuration.device
        chosen = optimisations(configuration, device)
        if configuration.lora_rank:  # merged first: some optimisations make the weights constants
            self.model = load_model(configuration, device, Optimisations(precision=chosen.precision))
            load_random_lora(self.model, configuration.lora_rank)
            self.model.optimise(chosen)
        else:
            self.model = load_model(configuration, device, chosen)
        self.config = self.model.config
        self.precision = self.model.optimisations.precision
        techniques = ("avx512_layers", "packed", "avx2_layers")  # which older commits lack
        self.chosen_layers = next(
            (name for name in techniques if getattr(self.model.optimisations, name, False)), "plain"
        )
        self.compiles = self.model.optimisations.compile != "none"
        workloads = {
            "txt2img": self._txt2img,
            "inpaint": self._inpaint,
            "text": self._text,
            "unet": self._unet,
            "vae": self._vae,
        }
        self.round: Callable[[int], Output] = workloads[configuration.workload]

    def _sampling(self) -> dict[str, object]:
        """The sampling arguments; defaults that an older commit's methods do not have are left out."""
        configuration = self.configuration
        added = {"timestep_spacing": configuration.timestep_spacing, "sigmas": configuration.sigmas}
        return {
            "steps": configuration.steps,
            "sampler": configuration.sampler,
            "scale": configuration.scale,
            **{name: value for name, value in added.items() if value not in (None, "schedule")},
        }

    def _txt2img(self, seed: int) -> Output:
        result = self.model.txt2img(
            self.configuration.prompt,
            **self._sampling(),
            seed=seed,
            batch=self.configuration.batch,
            height=self.configuration.height or None,
            width=self.configuration.width or None,
            progress=self.after_step,
        )
        return Output(result.latents, result.images, result.seconds, result.unet_calls)

    def _inpaint(self, seed: int) -> Output:
        configuration = self.configuration
        height, width = configuration.height or self.config.image_size, configuration.width or self.config.image_size
        result = self.model.inpaint(
            configuration.prompt,
            *gradient_with_hole(height, width),
            **self._sampling(),
            seed=seed,
            batch=configuration.batch,
            progress=self.after_step,
        )
        return Output(result.latents, result.images, result.seconds, result.unet_calls)

    def _text(self, seed: int) -> Output:
        return Output(_by_image(self._encode()), None, {}, 0)

    def _unet(self, seed: int) -> Output:
        x = initial_latents(self.model, self.configuration, seed)
        further = self.config.unet.in_channels - x.shape[1]  # of an inpainting or a depth model
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, further))
        shared = getattr(self.model.optimisations, "shared_guidance", False)  # which older commits lack
        timesteps = torch.full((1 if shared else 2 * len(x),), UNET_TIMESTEP, device=x.device)
        with torch.no_grad(), compat.model_context(self.model):
            out = self.model.unet(x if shared else torch.cat([x, x]), timesteps, self._context)
        return Output(_by_image(out), None, {}, 1)

    def _vae(self, seed: int) -> Output:
        latents = initial_latents(self.model, self.configuration, seed) * self.config.scale_factor
        return Output(self.model.decode(latents), None, {}, 0)

    @functools.cached_property
    def _context(self) -> Tensor:
        return self._encode()

    def _encode(self) -> Tensor:
        batch = self.configuration.batch
        return self.model.encode_prompts([""] * batch + [self.configuration.prompt] * batch)

    def stop_observing(self) -> None:
        """Profile no call for `kernels`, in an `sd` that can leave it out."""
        if hasattr(self.model, "stop_observing"):
            self.model.stop_observing()

    def kernels(self) -> dict[str, list[str]]:
        """See perf.worker.engines.interface.Engine."""
        return {network: list(names) for network, names in self.model.kernels.items()}


def _by_image(pairs: Tensor) -> Tensor:
    """[2B, ...] with the unconditional half first -> [B, 2, ...]."""
    return pairs.unflatten(0, (2, -1)).transpose(0, 1)
