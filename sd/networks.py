"""The three networks of a model: loading them, how they run, their weights, LoRA and embeddings, and direct calls."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sd.checkpoint.contents import ASSUMPTION, prediction_of
from sd.checkpoint.embedding import read_embedding, require_new_token
from sd.checkpoint.layouts import UNET, State, native_to_original, with_prefix
from sd.checkpoint.load import load, read
from sd.checkpoint.lora import Merged, read_lora, targets
from sd.checkpoint.networks import factories, materialise
from sd.choices import EMBEDDED_INPAINTING, EMBEDDED_WEIGHTS, RUNTIMES
from sd.config.presets import ModelConfig, preset
from sd.errors import CheckpointError, CheckpointWarning, ConfigError
from sd.features import has
from sd.models.autoencoder import Autoencoder
from sd.models.text_encoder import TextEncoder
from sd.models.tokenizer import tokenize, tokenize_chunks
from sd.models.unet import UNet
from sd.optimise.apply import apply, float32_precision, pack_weights
from sd.optimise.optimisations import WEIGHT_DTYPES, Optimisations
from sd.optimise.packed import unpack
from sd.prompts import PromptChunks, number_of_chunks, warn_of_dropped
from sd.sampling.schedule import Schedule

Own = TypeVar("Own", bound="Networks")


class Networks:
    """The networks of Stable Diffusion 1.x or 2.x; construct with `from_checkpoint`, `tiny` or `random`.

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
        cls: type[Own],
        path: str | Path,
        config: ModelConfig | str | Path | None = None,
        device: torch.device | str = "cpu",
        optimisations: Optimisations = Optimisations(),
        progress: bool | None = None,
        vae: str | Path | None = None,
        text_encoder: str | Path | None = None,
        ignore_unknown_keys: bool = False,
    ) -> Own:
        """Load a published checkpoint: .ckpt, .safetensors or a diffusers folder.

        config: a preset name, a YAML file in the original layout, or None to detect SD1 or SD2 from the weights. The
        weights do not record whether the UNet predicts eps or v: pass `sd2-v` for SD2 v models, unless the file has an
        entry or metadata for it, or is a diffusers folder.
        progress: whether to show a progress bar; None shows it on a terminal.
        vae, text_encoder: files or folders of these networks, in place of those in the checkpoint, if it has any.
        ignore_unknown_keys: leave out weights that belong to no layer.
        Warns with sd.errors.CheckpointWarning of contents that are not used, and of an SD2 model without `config` and record,
        which is taken for one of eps. Raises CheckpointError, ConfigError or Unavailable.
        """
        loaded_config, states = load(
            path,
            resolve_config(config),
            progress,
            vae=vae,
            text_encoder=text_encoder,
            ignore_unknown_keys=ignore_unknown_keys,
        )
        if config is None and loaded_config.name == "sd2" and prediction_of(path) is None:
            warnings.warn(
                f"{path}: {ASSUMPTION} eps, as SD2 at 512 pixels does; if the images are noise, pass config='sd2-v', and else "
                "config='sd2'",
                CheckpointWarning,
                stacklevel=2,
            )
        return cls._from_states(loaded_config, states, device, optimisations)

    @classmethod
    def _from_states(
        cls: type[Own],
        config: ModelConfig,
        states: dict[str, State],
        device: torch.device | str,
        optimisations: Optimisations,
    ) -> Own:
        dtype = WEIGHT_DTYPES[optimisations.precision]
        networks: dict[str, Any] = {
            name: materialise(factory, states.pop(name), torch.device(device), dtype)
            for name, factory in factories(config).items()
        }
        return cls(config, device=device, optimisations=optimisations, **networks)

    @classmethod
    def tiny(
        cls: type[Own],
        device: torch.device | str = "cpu",
        optimisations: Optimisations = Optimisations(),
        inpainting: bool = False,
    ) -> Own:
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
        cls: type[Own],
        config: ModelConfig | str = "sd2",
        seed: int = 0,
        device: torch.device | str = "cpu",
        optimisations: Optimisations = Optimisations(),
    ) -> Own:
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

    def to(self: Own, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None) -> Own:
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
        of_weights = {weight.device for weight in self.parameters()}  # several after an earlier move that failed
        if target != self.device or {each.type for each in of_weights} != {target.type} or len(of_weights) > 1:
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
        constant folding, quantisation or another runtime holds the old weights, or LoRA is merged into them.
        """
        self._require_weights_in_use("load_state_dict")
        if self._merged.loras:
            raise ConfigError("load_state_dict: LoRA is merged into the weights; call unload_lora() first")
        with self._plain_weights():
            own = self.state_dict()
            wrong = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
            if wrong:
                raise CheckpointError(f"load_state_dict: {len(wrong)} names or shapes do not match, such as {wrong[0]}")
            for prefix, network in self._networks().items():
                start = f"{prefix}."
                network.load_state_dict({k[len(start) :]: weight for k, weight in state.items() if k.startswith(start)})

    @contextmanager
    def _plain_weights(self) -> Iterator[None]:
        """Context in which no weight is packed, so that `state_dict` shares memory with the model; then all is derived anew."""
        networks = (self.unet, self.autoencoder)
        try:
            for network in networks:
                unpack(network)
            yield
        finally:
            if self.optimisations.folded_projections:
                self.unet.fold_projections(True)
            pack_weights(networks, self.optimisations)

    def _require_weights_in_use(self, caller: str) -> None:
        chosen = self.optimisations
        constants = "freezing" in chosen.inductor or chosen.compile_backend in RUNTIMES
        if constants or chosen.quantisation != "none":
            raise ConfigError(
                f"{caller}: freezing, quantisation and other runtimes keep the old weights; load before optimise()"
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

    def stop_observing(self) -> None:
        """Observe no further `kernels`. A later profiler session of the process may get no GPU kernels after that of `kernels`."""
        self._calls.observed_unet.observe_call = self._calls.observed_decoder.observe_call = 0

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
            context: Tensor = self._calls.encode(ids.flatten(0, 1).to(self.device))
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


def resolve_config(config: ModelConfig | str | Path | None) -> ModelConfig | None:
    """Read a preset name or the path of a YAML file; a ModelConfig and None are returned as they are."""
    if config is None or isinstance(config, ModelConfig):
        return config
    if str(config).endswith((".yaml", ".yml")):
        from sd.config.yaml_reader import read_yaml

        return read_yaml(Path(config))
    return preset(str(config))
