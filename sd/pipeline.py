"""Stable Diffusion pipeline: the stages from a prompt or an image to uint8 images, in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sd.checkpoint.embedding import read_embedding, require_new_token
from sd.checkpoint.layouts import UNET, State, native_to_original, with_prefix
from sd.checkpoint.load import factories, load, materialise, read
from sd.checkpoint.lora import Merged, read_lora, targets
from sd.choices import EMBEDDED_INPAINTING, EMBEDDED_WEIGHTS, RUNTIMES
from sd.config.presets import DEPTH_CHANNELS, INPAINTING_CHANNELS, INPUTS, ModelConfig, preset
from sd.errors import BadImage, CheckpointError, ConfigError
from sd.features import has
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
from sd.models.autoencoder import Autoencoder
from sd.models.text_encoder import TextEncoder
from sd.models.tokenizer import Tokens, tokenize, tokenize_chunks
from sd.models.unet import UNet
from sd.optimise.apply import apply, float32_precision
from sd.optimise.optimisations import WEIGHT_DTYPES, Optimisations
from sd.optimise.packed import pack, unpack
from sd.prompts import PromptChunks, number_of_chunks, prompts_of_images, warn_of_dropped, warn_of_unused_negative
from sd.sampling import original_loop
from sd.sampling.blend import Blend
from sd.sampling.denoiser import Denoiser
from sd.sampling.noise import NoiseSource, chosen_noise
from sd.sampling.plan import Plan
from sd.sampling.samplers import sampler as sampler_by_name
from sd.sampling.schedule import Schedule
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


class StableDiffusion:
    """Stable Diffusion 1.x or 2.x; construct with `from_checkpoint`, `tiny` or `random`.

    unet, autoencoder, text_encoder: the networks, as `nn.Module`s in eval mode.
    device: where they are. optimisations: how they run. config: the architecture. schedule: the noise schedule.
    """

    def __init__(
        self,
        config: ModelConfig,
        unet: UNet,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        device: torch.device | str = "cpu",
        optimisations: Optimisations = Optimisations(),
    ):
        self.config = config
        self.unet, self.autoencoder, self.text_encoder = unet, autoencoder, text_encoder
        self.schedule = Schedule(config.schedule)
        # Importing the tokenizer takes seconds, which belong to loading and not to the first image.
        tokenize([""], config.text.kind)
        for network in self._networks().values():
            network.eval().requires_grad_(False)
        self._merged, self._added_tokens = Merged(), dict[str, range]()
        self._apply(torch.device(device), optimisations)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        config: ModelConfig | str | Path | None = None,
        device: torch.device | str = "cpu",
        optimisations: Optimisations = Optimisations(),
        progress: bool | None = None,
        vae: str | Path | None = None,
        text_encoder: str | Path | None = None,
        ignore_unknown_keys: bool = False,
    ) -> StableDiffusion:
        """Load a published checkpoint: .ckpt, .safetensors or a diffusers folder.

        config: a preset name, a YAML file in the original layout, or None to detect SD1 or SD2 from the weights. The
        weights do not record whether the UNet predicts eps or v: pass `sd2-v` for SD2 v models, unless the file has an
        entry or metadata for it, or is a diffusers folder.
        progress: whether to show a progress bar; None shows it on a terminal.
        vae, text_encoder: files or folders of these networks, in place of those in the checkpoint, if it has any.
        ignore_unknown_keys: leave out weights that belong to no layer.
        Warns with sd.errors.CheckpointWarning of contents that are not used. Raises CheckpointError, ConfigError or
        Unavailable.
        """
        loaded_config, states = load(
            path,
            resolve_config(config),
            progress,
            vae=vae,
            text_encoder=text_encoder,
            ignore_unknown_keys=ignore_unknown_keys,
        )
        return cls._from_states(loaded_config, states, device, optimisations)

    @classmethod
    def _from_states(
        cls, config: ModelConfig, states: dict[str, State], device: torch.device | str, optimisations: Optimisations
    ) -> StableDiffusion:
        dtype = WEIGHT_DTYPES[optimisations.precision]
        networks: dict[str, Any] = {
            name: materialise(factory, states.pop(name), torch.device(device), dtype)
            for name, factory in factories(config).items()
        }
        return cls(config, device=device, optimisations=optimisations, **networks)

    @classmethod
    def tiny(
        cls,
        device: torch.device | str = "cpu",
        optimisations: Optimisations = Optimisations(),
        inpainting: bool = False,
    ) -> StableDiffusion:
        """Load the embedded model: 64x64 images of coloured shapes on coloured backgrounds (see sd.tiny.train).

        inpainting: with the UNet of nine input channels that was tuned from it (see sd.tiny.train_inpaint).
        """
        if not inpainting:
            return cls.from_checkpoint(EMBEDDED_WEIGHTS, "tiny", device, optimisations, progress=False)
        states = load(EMBEDDED_WEIGHTS, preset("tiny"), progress=False)[1]
        states["unet"] = with_prefix(read(EMBEDDED_INPAINTING, progress=False), UNET)
        return cls._from_states(preset("tiny-inpaint"), states, device, optimisations)

    @classmethod
    def random(
        cls,
        config: ModelConfig | str = "sd2",
        seed: int = 0,
        device: torch.device | str = "cpu",
        optimisations: Optimisations = Optimisations(),
    ) -> StableDiffusion:
        """Build a full-size model with seeded random weights, for speed measurements without a checkpoint."""
        resolved = resolve_config(config) or preset("sd2")
        device = torch.device(device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            # Initialised on the target device where torch supports it; `_apply` moves the networks otherwise.
            with device if has("device_context") else nullcontext():
                networks = UNet(resolved.unet), Autoencoder(resolved.autoencoder), TextEncoder(resolved.text)
        return cls(resolved, *networks, device, optimisations)

    def _networks(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "autoencoder": self.autoencoder, "text_encoder": self.text_encoder}

    def _apply(self, device: torch.device, optimisations: Optimisations) -> None:
        self._calls = apply(self.unet, self.autoencoder, self.text_encoder, device, optimisations)
        self.device, self.optimisations = device, optimisations

    def optimise(self, optimisations: Optimisations) -> None:
        """Apply other optimisations to the same weights.

        Raises, with the model unchanged, Unavailable where they cannot run here and ConfigError where they need a
        precision that the weights have lost.
        """
        self._apply(self.device, optimisations)

    def to(self, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None) -> StableDiffusion:
        """Move the networks to `device` and return self; graphs, tables and compiled code are made anew there.

        Raises ConfigError for a dtype: precision belongs to `optimise`. Raises Unavailable, with the model unchanged,
        where the optimisations cannot run on that device.
        """
        if dtype is not None or isinstance(device, torch.dtype):
            raise ConfigError(
                f"to: dtype {dtype or device} is not accepted; pass precision to Optimisations and call optimise()"
            )
        if device is None:
            raise ConfigError("to: pass a device")
        target = torch.device(device)
        if target != self.device:
            self._apply(target, self.optimisations)
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters of UNet, autoencoder and text encoder."""
        for network in self._networks().values():
            yield from network.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights of the networks under the prefixes `unet.`, `autoencoder.` and `text_encoder.`.

        Names and shapes are the same for all optimisations, `mha` and fused projections included. The tensors share
        memory with the model, except for packed weights, which are copied.
        """
        state = {}
        for network_name, network in self._networks().items():
            # `native_to_original` recognises attention by its name in a checkpoint.
            weights = native_to_original({UNET + name: weight for name, weight in network.state_dict().items()})
            state.update({f"{network_name}.{name[len(UNET) :]}": weight for name, weight in weights.items()})
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the weights of a `state_dict` into the networks, in their dtype and on their device.

        Raises, with the model unchanged, CheckpointError unless names and shapes match exactly, and ConfigError where
        code compiled ahead of time, constant folding or quantisation holds the old weights, or LoRA is merged into them.
        """
        self._require_weights_in_use("load_state_dict")
        if self._merged.loras:
            raise ConfigError("load_state_dict: LoRA is merged into the weights; call unload_lora() first")
        own = self.state_dict()
        wrong = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
        if wrong:
            raise CheckpointError(f"load_state_dict: {len(wrong)} names or shapes do not match, such as {wrong[0]}")
        with self._plain_weights():
            for prefix, network in self._networks().items():
                start = f"{prefix}."
                network.load_state_dict({k[len(start) :]: weight for k, weight in state.items() if k.startswith(start)})

    @contextmanager
    def _plain_weights(self) -> Iterator[None]:
        """Context in which no weight is packed, so that `state_dict` shares memory with the model."""
        networks = (self.unet, self.autoencoder) if self.optimisations.packed else ()
        for network in networks:
            unpack(network)
        try:
            yield
        finally:
            for network in networks:
                pack(network)

    def _require_weights_in_use(self, caller: str) -> None:
        chosen = self.optimisations
        constants = chosen.aot is not None or "freezing" in chosen.inductor or chosen.compile_backend in RUNTIMES
        if constants or chosen.quantisation != "none":
            raise ConfigError(
                f"{caller}: aot, freezing, quantisation and other runtimes keep the old weights; load before optimise()"
            )

    def load_lora(self, path: str | Path, scale: float = 1.0) -> None:
        """Merge a LoRA file into the weights, on top of those already merged.

        scale: factor of the update; 0 leaves the weights unchanged. The changed weights are kept in host memory for
        `unload_lora`. They change in place, so that nothing is compiled or captured again.
        Raises, with the model unchanged, CheckpointError for a file that does not fit the model or is of another method
        (see sd.checkpoint.lora), and ConfigError as `load_state_dict` does.
        """
        if not math.isfinite(scale):
            raise ConfigError(f"load_lora: scale {scale}: must be a finite number")
        self._require_weights_in_use("load_lora")
        with self._plain_weights(), float32_precision(tf32=False):
            state = self.state_dict()
            updates = read_lora(path, state)
            if scale:
                self._merged.add(updates, scale, targets(state))

    def unload_lora(self) -> None:
        """Restore the weights from before the first `load_lora`, bit for bit. Raises ConfigError as `load_state_dict`."""
        if self._merged.loras:
            self._require_weights_in_use("unload_lora")
            with self._plain_weights():
                self._merged.remove(targets(self.state_dict()))

    def load_embedding(self, path: str | Path, token: str | None = None) -> str:
        """Load a textual-inversion embedding and return its token, a word of prompts that stands for its vectors.

        token: the word; None for the file's own (see sd.checkpoint.embedding.read_embedding).
        Raises CheckpointError for a file that does not fit the model, ConfigError for a token that is loaded already.
        """
        encoder = self.text_encoder
        embedding = read_embedding(path, encoder.config.width, token)
        require_new_token(embedding.token, self._added_tokens)
        table = encoder.token_embedding.weight
        vectors = embedding.vectors.to(table.device, table.dtype)
        before = vectors[:0] if encoder.added is None else encoder.added.detach()
        start = encoder.config.vocab_size + len(before)
        encoder.added = torch.cat([before, vectors]).requires_grad_(table.requires_grad)
        self._added_tokens[embedding.token] = range(start, start + len(vectors))
        return embedding.token

    @property
    def kernels(self) -> dict[str, tuple[str, ...]]:
        """Attention kernels that ran, by network; empty tuples before the first image, or the second where compiled."""
        return self._calls.kernels

    def context(self) -> AbstractContextManager[None]:
        """Context for direct calls of the networks, with the precision settings of `optimisations`; see Calls.context."""
        return self._calls.context()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], prompt_chunks: PromptChunks = 1) -> Tensor:
        """Encode prompts to the UNet's context [B, 77 prompt_chunks, C], in the dtype of the computation.

        prompt_chunks: as in `txt2img`. Warns of prompts that are too long.
        """
        tokens = tokenize_chunks(prompts, self.config.text.kind, number_of_chunks(prompt_chunks), self._added_tokens)
        warn_of_dropped(prompts, [], tokens)
        return self._encode(tokens.ids)

    def _encode(self, ids: Tensor) -> Tensor:
        """Encode tokens [B, chunks, 77] to the context [B, 77 chunks, C], each chunk by itself."""
        with self._calls.context():
            context: Tensor = self.text_encoder(ids.flatten(0, 1).to(self.device))
        return context.reshape(len(ids), -1, context.shape[-1])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode sampled latents [B, 4, h, w] to float32 images [B, 3, 8h, 8w], about [-1, 1]."""
        with self._calls.context():
            images: Tensor = self._calls.decode(latents / self.config.scale_factor)
        return images

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode images [B, 3, H, W] in [-1, 1] to float32 latents [B, 4, H/8, W/8], scaled for the UNet.

        noise: unit Gaussian, shaped like the latents, to sample the posterior; None returns its mean.
        """
        with self._calls.context():
            mean, log_variance = self.autoencoder.encode(images.to(self.device))
        latents: Tensor = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        return self.config.scale_factor * latents

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
        progress: called as progress(step, steps) after every step.
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
            prompt,
            steps,
            scale,
            seed,
            batch,
            negative_prompt,
            eta,
            rng,
            progress,
            generator,
            prompt_chunks,
            sampler,
            timestep_spacing,
            sigmas,
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
            prompt,
            steps,
            scale,
            seed,
            batch,
            negative_prompt,
            eta,
            rng,
            progress,
            generator,
            prompt_chunks,
            sampler,
            timestep_spacing,
            sigmas,
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
            x = noise.posterior(shape, self.device)  # drawn at strength 1 too, as in the original script
            if not from_noise:
                x = self.encode(image[None].expand(len(prompts), -1, -1, -1), x)
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
        height, width = height or self.config.image_size, width or self.config.image_size
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
        if not guided:
            return (self._encode(tokens.ids), None), tokens
        # The original encodes them apart. On a CPU one call saves nothing, and on some torch changes the last bits.
        if self.optimisations.original_steps or self.device.type == "cpu":
            return (self._encode(tokens.ids[:count]), self._encode(tokens.ids[count:])), tokens
        conditional, unconditional = self._encode(tokens.ids).chunk(2)
        return (conditional, unconditional), tokens

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
        denoise = Denoiser(self._calls.unet_of_run(), *prediction)
        if chosen.cache_context_kv and isinstance(denoise.context, Tensor):
            denoise.context = self.unet.project_context(denoise.context)
        if plan.evaluations and (chosen.cache_time_embeddings or self.unet.embeds_guidance):
            guidance = scale if self.unet.embeds_guidance else None
            denoise.times = sorted({evaluation.t for evaluation in plan.evaluations})
            denoise.time_table = self.unet.time_table(torch.tensor(denoise.times).to(self.device), guidance)
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


def resolve_config(config: ModelConfig | str | Path | None) -> ModelConfig | None:
    """Read a preset name or the path of a YAML file; a ModelConfig and None are returned as they are."""
    if config is None or isinstance(config, ModelConfig):
        return config
    if str(config).endswith((".yaml", ".yml")):
        from sd.config.yaml_reader import read_yaml

        return read_yaml(Path(config))
    return preset(str(config))


def _no_progress(step: int, steps: int) -> None:
    pass
