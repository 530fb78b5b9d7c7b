"""Stable Diffusion pipeline: the stages from a prompt or an image to uint8 images, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sd.config.presets import DEPTH_CHANNELS, INPAINTING_CHANNELS, INPUTS
from sd.errors import BadImage, ConfigError
from sd.images import (
    image_tensor,
    image_with_depth,
    image_with_mask,
    latent_depth,
    latent_mask,
    require_pixels,
    require_size,
    uint8_images,
)
from sd.models.tokenizer import Tokens, tokenize_chunks
from sd.networks import Networks
from sd.prompts import PromptChunks, number_of_chunks, prompts_of_images, warn_of_dropped, warn_of_unused_negative
from sd.sampling import original_loop
from sd.sampling.blend import Blend
from sd.sampling.denoiser import Denoiser
from sd.sampling.noise import NoiseSource, chosen_noise
from sd.sampling.plan import Plan
from sd.sampling.samplers import sampler as sampler_by_name
from sd.stage_clock import StageClock

if TYPE_CHECKING:
    from PIL.Image import Image

Progress = Callable[[int, int], None]
# Methods by input channels of the UNet; those of text-to-image models otherwise.
METHODS = {INPAINTING_CHANNELS: ("inpaint",), DEPTH_CHANNELS: ("depth2img",)}
TEXT_TO_IMAGE_METHODS = ("txt2img", "img2img", "inpaint")
ORIGINAL_SPACINGS = (None, "leading")  # of ddim and plms: the timesteps of the original scripts


@dataclass(frozen=True)
class Result:
    """Generated images and the time of each stage.

    images: uint8 [B, H, W, 3] on the CPU.
    latents: float32 [B, 4, H/8, W/8] on the model's device, after the last sampler step.
    seconds: by stage: `text`, `unet` (the whole sampling loop), `vae` (decoding and the copy to the CPU), and
        `encode` with an image as input.
    unet_calls: number of UNet evaluations.
    seed: the seed, random where None was passed; image i uses seed + i. With a generator its `initial_seed()`, with a
        list of generators the list of theirs.
    prompt_chunks: chunks of 75 tokens in which the prompts were encoded.
    dropped, dropped_negative: for each image, the text of the prompt and of the negative prompt after the last chunk, which
        was not used; empty where the whole prompt was. dropped_negative is empty without guidance.
    """

    images: Tensor
    latents: Tensor
    seconds: dict[str, float]
    unet_calls: int
    seed: int | list[int]
    prompt_chunks: int = 1
    dropped: tuple[str, ...] = ()
    dropped_negative: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Options:
    """The arguments that img2img and depth2img share, with their meaning in `StableDiffusion.txt2img`."""

    prompt: str | list[str]
    steps: int
    scale: float
    seed: int | None
    batch: int
    negative_prompt: str | list[str] | None
    eta: float
    rng: str | NoiseSource
    progress: Progress | None
    generator: torch.Generator | list[torch.Generator] | None
    prompt_chunks: PromptChunks
    sampler: str
    timestep_spacing: str | None
    sigmas: str


class StableDiffusion(Networks):
    """Stable Diffusion 1.x or 2.x: construct with `from_checkpoint`, `tiny` or `random`, then generate.

    Its networks, their weights and how they run are those of `sd.networks.Networks`.
    """

    @torch.no_grad()
    def txt2img(
        self,
        prompt: str | list[str],
        steps: int = 50,
        sampler: str = "plms",
        scale: float = 7.5,
        seed: int | None = 1,
        batch: int = 1,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        negative_prompt: str | list[str] | None = "",
        eta: float = 0.0,
        rng: str | NoiseSource = "per-image",
        progress: Progress | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_chunks: PromptChunks = 1,
        timestep_spacing: str | None = None,
        sigmas: str = "schedule",
    ) -> Result:
        """Generate `batch` images of each prompt.

        steps: sampler steps. sampler: a name of sd.sampling.samplers.SAMPLERS. eta: DDIM's, 0 to 1.
        timestep_spacing: `leading`, `linspace`, `trailing` or `sgm_turbo`; None for the sampler's own. sigmas: `schedule`, or
            `karras` (arXiv 2206.00364).
        scale: classifier-free guidance (arXiv 2207.12598); 1 disables it, which halves the batch of the UNet. A model with
            a guidance embedding (LCM) takes the scale as an input of one UNet call, without a negative prompt.
        seed: image i is drawn from seed + i, at any batch size and on any device; None draws a random seed (Result.seed).
        generator: CPU generators in place of the seed. A list has one for each image; a single one draws for all images
            in turn, so that images depend on the batch size.
        rng: `per-image`, `original` (draws of the original scripts from `seed`), or a source of sd.sampling.noise, which
            continues from an earlier call.
        height, width: pixels, multiples of 64; None for the model's own size.
        latents: initial noise x_T [B, 4, H/8, W/8], unit Gaussian, in place of drawn noise.
        negative_prompt: text of the unconditional half, one or a list like the prompts; None for the empty prompt.
        progress: called as progress(step, steps) after every step; it must not change the model.
        prompt_chunks: chunks of 75 tokens in which prompts are encoded; their contexts are concatenated. `auto` takes as
            many as the longest prompt of the call needs. A warning names the text after the last chunk (Result.dropped).

        Raises ConfigError for invalid arguments and BadImage for NaN or all-black images.
        """
        self._require_method("txt2img")
        plan, timesteps = self._plan(sampler, steps, eta, timestep_spacing, sigmas)
        prompts, negatives = prompts_of_images(prompt, negative_prompt, batch)
        shape = self.latent_shape(len(prompts), height, width)
        noise, reported_seed = chosen_noise(rng, seed, generator, len(prompts), self.device)
        start = None if latents is None else self._initial(latents, shape)
        clock = StageClock(self.device)
        with clock.stage("text"):
            contexts, tokens = self._contexts(prompts, negatives, scale, prompt_chunks)
        with clock.stage("unet"), self._calls.context():
            x = noise.initial(shape, self.device) if start is None else start
            x = self._sample(sampler, plan, timesteps, x, contexts, scale, noise, eta, progress)
        return self._finish(x, clock, len(plan.evaluations), reported_seed, tokens)

    @torch.no_grad()
    def img2img(
        self,
        prompt: str | list[str],
        image: Tensor | Image,
        strength: float = 0.8,
        steps: int = 50,
        scale: float = 9.0,
        seed: int | None = 1,
        batch: int = 1,
        negative_prompt: str | list[str] | None = "",
        eta: float = 0.0,
        rng: str | NoiseSource = "per-image",
        progress: Progress | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_chunks: PromptChunks = 1,
        sampler: str = "ddim",
        timestep_spacing: str | None = None,
        sigmas: str = "schedule",
    ) -> Result:
        """Generate `batch` images of each prompt from an initial image (SDEdit, arXiv 2108.01073).

        image: float [3, H, W] in [-1, 1] with H and W multiples of 64, or a PIL image (see sd.images.image_tensor).
        strength: fraction of the steps to run, 0 to 1, from the noise level of the first of them. As in the original
            scripts, DDIM's noise is that of timestep int(strength * steps), and denoising starts at the timestep below
            it; at strength 1, where the original raises an IndexError, the last timestep is used.
        The other arguments and the errors are those of `txt2img`.
        """
        self._require_method("img2img")
        if not isinstance(image, Tensor):
            image = image_tensor(image)
        require_pixels(image)
        options = _Options(
            prompt=prompt,
            steps=steps,
            scale=scale,
            seed=seed,
            batch=batch,
            negative_prompt=negative_prompt,
            eta=eta,
            rng=rng,
            progress=progress,
            generator=generator,
            prompt_chunks=prompt_chunks,
            sampler=sampler,
            timestep_spacing=timestep_spacing,
            sigmas=sigmas,
        )
        return self._from_image(image, None, strength, options)

    @torch.no_grad()
    def depth2img(
        self,
        prompt: str | list[str],
        image: Tensor | Image,
        depth: Tensor | Image | None = None,
        strength: float = 0.9,
        steps: int = 50,
        scale: float = 9.0,
        seed: int | None = 1,
        batch: int = 1,
        negative_prompt: str | list[str] | None = "",
        eta: float = 0.0,
        rng: str | NoiseSource = "per-image",
        progress: Progress | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_chunks: PromptChunks = 1,
        sampler: str = "ddim",
        timestep_spacing: str | None = None,
        sigmas: str = "schedule",
    ) -> Result:
        """Generate `batch` images of each prompt from an initial image and its depth, with a depth-to-image model.

        depth: brighter where nearer, of the size of the image: a PIL image in grey, or [H, W] of any scale. It is required,
            since the depth estimator of the original (MiDaS) is not included.
        strength: as in `img2img`, below 1. At 1 the image is not used, only its depth: sampling starts from noise. There
            DDIM leaves out its first step, as in the original script.
        The other arguments and the errors are those of `img2img`.
        """
        self._require_method("depth2img")
        if depth is None:
            raise ConfigError("depth: is missing, and no depth estimator (MiDaS) is included; give a depth image")
        pixels, depth_map = image_with_depth(image, depth)
        options = _Options(
            prompt=prompt,
            steps=steps,
            scale=scale,
            seed=seed,
            batch=batch,
            negative_prompt=negative_prompt,
            eta=eta,
            rng=rng,
            progress=progress,
            generator=generator,
            prompt_chunks=prompt_chunks,
            sampler=sampler,
            timestep_spacing=timestep_spacing,
            sigmas=sigmas,
        )
        return self._from_image(pixels, depth_map, strength, options)

    def _from_image(self, image: Tensor, depth: Tensor | None, strength: float, options: _Options) -> Result:
        """img2img, and with a depth map depth2img."""
        if not 0.0 <= strength <= 1.0:
            raise ConfigError(f"strength {strength}: must be in [0, 1]")
        steps, sampler, spacing = options.steps, options.sampler, options.timestep_spacing
        prompts, negatives = prompts_of_images(options.prompt, options.negative_prompt, options.batch)
        shape = self.latent_shape(len(prompts), *image.shape[1:])
        original = sampler == "ddim" and spacing in ORIGINAL_SPACINGS
        from_noise = depth is not None and strength == 1.0
        fraction: float | None = strength
        if from_noise:  # int(fraction * steps) is steps - 1
            fraction = 1 - 0.5 / max(steps, 1) if original else None
        plan, timesteps = self._plan(sampler, steps, options.eta, spacing, options.sigmas, fraction)
        if from_noise and not plan.evaluations:
            raise ConfigError(
                "strength 1: ddim leaves out its first step, as in the original script; use 2 steps or more"
            )
        noise, seed = chosen_noise(options.rng, options.seed, options.generator, len(prompts), self.device)
        clock = StageClock(self.device)
        condition: Tensor | None = None
        with clock.stage("encode"):
            # Drawn at strength 1 too, as in the original script.
            x = noise.posterior(shape, self.device, shared=depth is None)
            if not from_noise:
                x = self.encode(image[None], x)
            if depth is not None:
                cells = latent_depth(depth, *shape[2:]).to(self.device).expand(len(prompts), -1, -1, -1)
                condition = cells.contiguous(memory_format=self.optimisations.memory_format())
        with clock.stage("text"):
            contexts, tokens = self._contexts(prompts, negatives, options.scale, options.prompt_chunks)
        with clock.stage("unet"), self._calls.context():
            if from_noise:
                x = noise.initial(shape, self.device)
            elif plan.evaluations:
                alpha = plan.evaluations[0].alpha
                if original:  # noise of the timestep above
                    originals = self.schedule.uniform_timesteps(steps)
                    alpha = self.schedule.alpha(originals[min(plan.steps, len(originals) - 1)])
                x = alpha * x + (1 - alpha**2) ** 0.5 * noise.initial(shape, self.device)
            run = (sampler, plan, timesteps, x, contexts, options.scale, noise, options.eta, options.progress)
            x = self._sample(*run, condition)
        return self._finish(x, clock, len(plan.evaluations), seed, tokens)

    @torch.no_grad()
    def inpaint(
        self,
        prompt: str | list[str],
        image: Tensor | Image,
        mask: Tensor | Image,
        strength: float = 1.0,
        steps: int = 50,
        sampler: str = "ddim",
        scale: float = 7.5,
        seed: int | None = 1,
        batch: int = 1,
        latents: Tensor | None = None,
        negative_prompt: str | list[str] | None = "",
        eta: float = 0.0,
        rng: str | NoiseSource = "per-image",
        progress: Progress | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_chunks: PromptChunks = 1,
        timestep_spacing: str | None = None,
        sigmas: str = "schedule",
    ) -> Result:
        """Repaint the white part of `mask` in `batch` images of each prompt.

        An inpainting model gets the mask and the image, grey under the mask, as inputs of its UNet; with a text-to-image
        model, the rest of the image is restored after each step (see sd.sampling.blend). Decoding changes that rest by
        the error of the autoencoder, as in the original scripts.

        image: as in `img2img`. mask: a PIL image of the same size, or float in [0, 1] or bool [H, W]; repainted from 0.5.
        strength: fraction of the steps that run, above 0; below 1 they start from the noised image.
        latents: initial noise, as in `txt2img`. rng: `original` draws it as the original scripts do, with NumPy.
        The other arguments and the errors are those of `txt2img`.
        """
        self._require_method("inpaint")
        if not 0.0 < strength <= 1.0:
            raise ConfigError(f"strength {strength}: must be above 0 and at most 1")
        pixels, pixel_mask = image_with_mask(image, mask)
        prompts, negatives = prompts_of_images(prompt, negative_prompt, batch)
        shape = self.latent_shape(len(prompts), *pixels.shape[1:])
        whole = strength == 1.0
        plan, timesteps = self._plan(sampler, steps, eta, timestep_spacing, sigmas, None if whole else strength)
        if not plan.evaluations:
            raise ConfigError(f"strength {strength} of {steps} steps is less than 1 step: increase one of them")
        start = None if latents is None else self._initial(latents, shape)
        noise, reported_seed = chosen_noise(rng, seed, generator, len(prompts), self.device)
        clock = StageClock(self.device)
        with clock.stage("encode"):
            blend, condition = self._encode_inpainting(pixels, pixel_mask, shape, noise, start, not whole)
        with clock.stage("text"):
            contexts, tokens = self._contexts(prompts, negatives, scale, prompt_chunks)
        with clock.stage("unet"), self._calls.context():
            x = blend.noise if whole else blend.noised(plan.evaluations[0].alpha)
            run = (sampler, plan, timesteps, x, contexts, scale, noise, eta, progress)
            x = self._sample(*run, condition, None if self.config.inpainting else blend)
        return self._finish(x, clock, len(plan.evaluations), reported_seed, tokens)

    def _encode_inpainting(
        self,
        image: Tensor,
        mask: Tensor,
        shape: tuple[int, ...],
        noise: NoiseSource,
        start: Tensor | None,
        starts_from_image: bool,
    ) -> tuple[Blend, Tensor | None]:
        """Return x_T and the image's latents as a Blend, and the further input channels of an inpainting model, or None.

        shape: of the latents. Draws are in the order of diffusers: image, if its latents are used; x_T, unless it is
        passed as `start`; masked image.
        """
        layout = self.optimisations.memory_format()
        cells = latent_mask(mask, *shape[2:]).to(self.device)
        original = torch.zeros(shape, device=self.device)
        if starts_from_image or not self.config.inpainting:
            original = self.encode(image[None], noise.posterior(shape, self.device))
        x = noise.inpainting_initial(shape, self.device) if start is None else start
        blend = Blend(cells.bool(), *(latents.contiguous(memory_format=layout) for latents in (original, x)))
        if not self.config.inpainting:
            return blend, None
        visible = self.encode((image * (1 - mask))[None], noise.posterior(shape, self.device))
        condition = torch.cat([cells.expand(len(visible), -1, -1, -1), visible], dim=1)
        return blend, condition.contiguous(memory_format=layout)

    def latent_shape(self, batch: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """Return the shape of the latents of images of that size in pixels; None is the model's own size.

        Raises ConfigError for sizes that are not positive multiples of 64.
        """
        height, width = (self.config.image_size if side is None else side for side in (height, width))
        require_size("height", height)
        require_size("width", width)
        factor = self.config.autoencoder.downsampling
        return batch, self.config.unet.out_channels, height // factor, width // factor

    def _plan(
        self,
        sampler: str,
        steps: int,
        eta: float,
        timestep_spacing: str | None,
        sigmas: str,
        strength: float | None = None,
    ) -> tuple[Plan, list[int]]:
        """Return the plan and, under `original_steps`, the ascending timesteps of the original's loop.

        strength: None from noise, else the fraction of the steps to run. Raises ConfigError.
        """
        plan = sampler_by_name(sampler)(self.schedule, steps, eta, timestep_spacing, sigmas, strength)
        if not self.optimisations.original_steps:
            return plan, []
        if timestep_spacing not in ORIGINAL_SPACINGS or sigmas != "schedule":
            raise ConfigError("original_steps: has the original's timesteps; leave out timestep_spacing and sigmas")
        return plan, self.schedule.uniform_timesteps(steps)[: plan.steps]

    def _require_method(self, method: str) -> None:
        channels = self.config.unet.in_channels
        methods = METHODS.get(channels, TEXT_TO_IMAGE_METHODS)
        if method not in methods:
            raise ConfigError(
                f"{method}: {self.config.name} is {INPUTS.get(channels, 'a text-to-image')} model: "
                f"call {' or '.join(methods)}, or load another model"
            )

    def _initial(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the caller's x_T on the device."""
        if tuple(latents.shape) != shape:
            raise ConfigError(f"latents of shape {tuple(latents.shape)}: the shape must be {shape}")
        return latents.to(self.device, torch.float32)

    def _contexts(
        self, prompts: list[str], negatives: list[str], scale: float, prompt_chunks: PromptChunks
    ) -> tuple[tuple[Tensor, Tensor | None], Tokens]:
        """Return the contexts of the prompts and, with guidance, of the negative prompts, and the tokens of both."""
        embedded = self.unet.embeds_guidance  # one UNet call with the scale as an input, not two halves
        if embedded and any(negatives):
            raise ConfigError("negative_prompt: this model embeds its guidance scale; leave out the negative prompt")
        if embedded and self.optimisations.original_steps:
            raise ConfigError("original_steps: the original scripts have no guidance embedding; leave it out")
        guided = scale != 1.0 and not embedded
        if not guided:
            warn_of_unused_negative(negatives)
        negatives, count = negatives if guided else [], len(prompts)
        tokens = tokenize_chunks(
            [*prompts, *negatives], self.config.text.kind, number_of_chunks(prompt_chunks), self._added_tokens
        )
        warn_of_dropped(prompts, negatives, tokens)
        halves = tokens.ids.chunk(2) if guided else (tokens.ids,)
        # Equal prompts are encoded once, whatever the batch; the original encodes each.
        if not self.optimisations.original_steps and len(set(prompts)) == 1 and len(set(negatives)) <= 1:
            halves = tuple(half[:1] for half in halves)
        # The original encodes them apart. On a CPU one call saves nothing, and on some torch changes the last bits.
        if self.optimisations.original_steps or self.device.type == "cpu":
            contexts = [self._encode(half) for half in halves]
        else:
            contexts = [*self._encode(torch.cat(halves)).chunk(len(halves))]
        contexts = [context.repeat(count // len(context), 1, 1) for context in contexts]
        return (contexts[0], contexts[1] if guided else None), tokens

    def _sample(
        self,
        sampler: str,
        plan: Plan,
        timesteps: list[int],
        x: Tensor,
        contexts: tuple[Tensor, Tensor | None],
        scale: float,
        noise: NoiseSource,
        eta: float,
        progress: Progress | None,
        condition: Tensor | None = None,
        blend: Blend | None = None,
    ) -> Tensor:
        """Denoise x_T to x_0 with `plan`, or over `timesteps` with the original's loop under `original_steps`.

        condition: further input channels of the UNet. blend: as in sd.sampling.plan.run.
        """
        chosen, on_step = self.optimisations, progress or _no_progress
        prediction = (*contexts, scale, self.config.parameterization, condition)
        if chosen.original_steps:
            original = original_loop.OriginalDenoiser(self._calls.unet, *prediction)
            out: Tensor = original_loop.run(
                sampler, original, x, self.schedule, timesteps, noise=noise, eta=eta, on_step=on_step, blend=blend
            )
            return out
        denoise = Denoiser(self._calls.unet_of_run(), *prediction, chosen.shared_guidance)
        if chosen.cache_context_kv and isinstance(denoise.context, Tensor):
            denoise.context = self._calls.project_context(denoise.context)
        if plan.evaluations and (chosen.cache_time_embeddings or self.unet.embeds_guidance):
            guidance = scale if self.unet.embeds_guidance else None
            denoise.times = sorted({evaluation.t for evaluation in plan.evaluations})
            denoise.time_table = self._calls.time_table(torch.tensor(denoise.times).to(self.device), guidance)
        x = x.contiguous(memory_format=chosen.memory_format())
        return self._calls.sample(plan, denoise, x, plan.noises(noise, x), on_step, blend)

    def _finish(self, x: Tensor, clock: StageClock, unet_calls: int, seed: int | list[int], tokens: Tokens) -> Result:
        with clock.stage("vae"):
            images, faults = uint8_images(self.decode(x))
        for i, fault in faults.items():
            advice = "try precision full or bf16, or attention_precision fp32"
            if self.optimisations.precision == "full":  # intact weights do not overflow fp32
                advice = "lower the guidance scale, or load the weights from their source again"
            raise BadImage(
                f"image {i + 1} of {len(images)} is {fault} (precision {self.optimisations.precision}, attention "
                f"{self.optimisations.attention}): {advice}"
            )
        dropped = tokens.dropped[: len(x)], tokens.dropped[len(x) :]
        return Result(images, x.contiguous(), clock.seconds(), unet_calls, seed, tokens.ids.shape[1], *dropped)


def _no_progress(step: int, steps: int) -> None:
    pass
