"""The optimisation step of the UNet: noised latents, loss, AdamW and averaged weights.

The step is that of CompVis' ddpm.py (arXiv 2112.10752), with min-SNR weights (arXiv 2303.09556) and v targets
(arXiv 2202.00512). `Trainer` also trains the other networks of sd.tiny.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sd.attention.availability import check
from sd.attention.functions import Attention, allowed_kernels
from sd.attention.modules import NativeAttention
from sd.checkpoint.file_formats import index, read_tensors, write_safetensors
from sd.choices import COMPILE_MODES, OPTIMISERS, PRECISIONS
from sd.errors import CheckpointError, ConfigError
from sd.features import has, require
from sd.models.unet import UNet
from sd.optimise.apply import float32_precision
from sd.optimise.approximate import merge_tokens
from sd.optimise.compile import CUDA_GRAPH_MODES, Compiler, restore_unet
from sd.optimise.packed import unpack

Module = TypeVar("Module", bound=nn.Module)
Loss = Callable[[], Tensor]
Stage = Callable[[str], AbstractContextManager[Any]]
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's tensors in a checkpoint


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. Raises ConfigError for unknown or contradictory values.

    rate, betas, weight_decay: AdamW's. optimiser: its implementation, one of OPTIMISERS; `auto` is `fused` where this
    torch has it, else `foreach`. max_gradient_norm: gradients are scaled down to it; None leaves them. decay: of the
    averaged weights; None keeps none.
    precision: `full`, or autocast with fp32 weights: `fp16` with a gradient scaler, `bf16`, `autocast` (fp16 on CUDA, bf16 on
    a CPU). attention, compile (a mode), checkpointing (recompute each ResBlock and transformer block in the backward pass)
    and channels_last are the UNet's.
    """

    rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    optimiser: str = "auto"
    max_gradient_norm: float | None = 1.0
    decay: float | None = 0.9999
    precision: str = "full"
    attention: Attention = field(default_factory=Attention)
    compile: str = "none"
    checkpointing: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("precision", PRECISIONS), ("compile", COMPILE_MODES), ("optimiser", OPTIMISERS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if self.compile in CUDA_GRAPH_MODES:
            raise ConfigError(
                f"compile mode {self.compile}: its CUDA graphs reuse the memory of gradients, which training accumulates; "
                "choose default or max-autotune-no-cudagraphs"
            )

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """dtype of matrix products and convolutions."""
        if self.precision == "autocast":
            return torch.float16 if device.type == "cuda" else torch.bfloat16
        return {"full": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.precision]


@dataclass(frozen=True)
class Batch:
    """The input of one step, on the UNet's device.

    latents: scaled latents of the images [B, 4, h, w]. context [B, T, C]. timesteps: int64 [B]. noise: shaped like the
    latents. condition: further input channels of an inpainting or depth model [B, C', h, w], which get no noise.
    """

    latents: Tensor
    context: Tensor
    timesteps: Tensor
    noise: Tensor
    condition: Tensor | None = None


def sample_latents(mean: Tensor, log_variance: Tensor, noise: Tensor, scale_factor: float) -> Tensor:
    """Latents drawn from the moments of `Autoencoder.encode`, scaled for the UNet."""
    return scale_factor * (mean + (0.5 * log_variance).exp() * noise)


def drop_captions(context: Tensor, empty: Tensor, dropped: Tensor) -> Tensor:
    """The context [B, T, C] with that of the empty caption [1, T, C] where `dropped` (bool [B]), for guidance."""
    return torch.where(dropped[:, None, None], empty, context)


def target(batch: Batch, alphas_cumprod: Tensor, predicts_v: bool) -> Tensor:
    """What the UNet must predict: the noise, or v."""
    if not predicts_v:
        return batch.noise
    alpha, sigma = _alpha_sigma(batch, alphas_cumprod)
    return alpha * batch.noise - sigma * batch.latents


def noised(batch: Batch, alphas_cumprod: Tensor) -> Tensor:
    """The UNet's input: latents with the noise of their timestep, then the condition."""
    alpha, sigma = _alpha_sigma(batch, alphas_cumprod)
    x = alpha * batch.latents + sigma * batch.noise
    return x if batch.condition is None else torch.cat([x, batch.condition], dim=1)


def _alpha_sigma(batch: Batch, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    squared = alphas_cumprod[batch.timesteps].float()[:, None, None, None]
    return squared.sqrt(), (1 - squared).sqrt()


def min_snr_weights(timesteps: Tensor, alphas_cumprod: Tensor, gamma: float, predicts_v: bool) -> Tensor:
    """Weights [B] of the losses: min(SNR, gamma) over SNR, or for v over SNR + 1 (arXiv 2303.09556)."""
    squared = alphas_cumprod[timesteps]
    snr = squared / (1 - squared)
    return (snr.clamp(max=gamma) / (snr + 1 if predicts_v else snr)).float()


def denoising_loss(
    unet: Callable[..., Tensor],
    batch: Batch,
    alphas_cumprod: Tensor,
    predicts_v: bool,
    snr_gamma: float | None = None,
) -> Tensor:
    """Mean squared error of the prediction, in fp32. alphas_cumprod: that of Schedule, on the batch's device."""
    predicted = unet(noised(batch, alphas_cumprod), batch.timesteps, batch.context).float()
    wanted = target(batch, alphas_cumprod, predicts_v)
    if snr_gamma is None:
        return F.mse_loss(predicted, wanted)
    errors = F.mse_loss(predicted, wanted, reduction="none").mean(dim=(1, 2, 3))
    return (errors * min_snr_weights(batch.timesteps, alphas_cumprod, snr_gamma, predicts_v)).mean()


def prepare_unet(unet: UNet, recipe: Recipe, device: torch.device) -> UNet:
    """Make a loaded UNet trainable in place: fp32 weights on `device`, with the attention and so on of the recipe.

    Raises, before any change, Unavailable for a backend that cannot run or has no backward pass here, and ConfigError for
    weights that were rounded to half precision.
    """
    if unet.dtype != torch.float32 or unet.quantisation != "none":
        raise ConfigError(f"training needs fp32 weights, and these are {unet.dtype}: load with precision full")
    if recipe.compute_dtype(device) == torch.float16:
        _scaler(device)
    check(recipe.attention, device, recipe.compute_dtype(device), unet.head_dims(), training=True)
    kernels = recipe.attention.kernels if recipe.attention.restricted else ()
    compiler = Compiler(recipe.compile, kernels=kernels) if recipe.compile != "none" else None
    if compiler:
        compiler.require(device)
    restore_unet(unet)
    unpack(unet)
    merge_tokens(unet, 0.0)
    unet.fuse_projections(False, False)
    unet.fold_projections(False)
    unet.to(device).to(memory_format=torch.channels_last if recipe.channels_last else torch.contiguous_format)
    unet.use_attention(recipe.attention)
    unet.train().requires_grad_(True)
    for module in unet.modules():
        if isinstance(module, NativeAttention):  # the original layout has no bias of q, k and v: it stays 0
            module.mha.in_proj_bias.requires_grad_(False)
    if recipe.checkpointing:
        for block in (*unet.res_blocks, *unet.transformer_blocks()):
            vars(block)["forward"] = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if compiler:
        vars(unet)["denoise"] = compiler(unet.denoise)
    return unet


class Trainer(Generic[Module]):
    """The state of a training: a network, its optimiser, averaged weights, gradient scaler and step.

    Under torch.distributed, gradients are averaged over the processes; every process must make the same calls.
    model: the network, to be called for the loss. average: a copy with the averaged weights, or None.
    step: updates so far.
    """

    def __init__(self, module: Module, recipe: Recipe, device: torch.device | str = "cpu"):
        self.module, self.recipe, self.device = module, recipe, torch.device(device)
        named = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
        self.names, self.weights = [name for name, _ in named], [weight for _, weight in named]
        self.average = None if recipe.decay is None else _copy(module)
        averaged = {} if self.average is None else dict(self.average.named_parameters())
        self.averaged = [averaged[name] for name in self.names if name in averaged]
        self.optimiser = _adamw(self.weights, recipe, self.device)
        self.dtype = recipe.compute_dtype(self.device)
        self.scaler = _scaler(self.device) if self.dtype == torch.float16 else None
        self.step = 0
        self.model: Callable[..., Any] = module
        if distributed.is_available() and distributed.is_initialized():
            devices = [self.device] if self.device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(module, device_ids=devices)

    def update(
        self, losses: Sequence[Loss], rate: float | None = None, stage: Stage = lambda name: nullcontext()
    ) -> tuple[Tensor, Tensor]:
        """Accumulate the gradients of all losses and update the weights.

        losses: called in turn for the loss of each part of a batch; of equal sizes. rate: the learning rate of this step.
        stage: context of each of `forward`, `backward`, `optimiser` and `average`, for timing; accumulation
        repeats the first two. Returns (mean loss, norm of the gradients before clipping), without waiting for the device.
        """
        if rate is not None:
            for group in self.optimiser.param_groups:
                group["lr"] = rate
        total = torch.zeros((), device=self.device)
        # Checkpointing runs attention in the backward pass too. Convolutions in fp32 would use TF32 by default.
        with float32_precision(tf32=False), allowed_kernels(self.recipe.attention):
            for i, loss_of in enumerate(losses):
                last = i == len(losses) - 1
                # Gradients are exchanged once per update, with the last part.
                waiting = nullcontext() if last or self.model is self.module else self.model.no_sync()  # type: ignore[attr-defined]
                with waiting:
                    with stage("forward"), self._autocast():
                        loss = loss_of() / len(losses)
                    with stage("backward"):
                        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                total += loss.detach()
        with stage("optimiser"):
            norm = self._optimise()
        self.step += 1
        if self.average is not None:
            with stage("average"):
                self._update_average()
        return total, norm

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _optimise(self) -> Tensor:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimiser)
        limit = self.recipe.max_gradient_norm
        norm = nn.utils.clip_grad_norm_(self.weights, math.inf if limit is None else limit)
        if self.scaler is None:
            self.optimiser.step()
        else:  # skips the update if a gradient overflowed
            self.scaler.step(self.optimiser)
            self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def _update_average(self) -> None:
        """Move the averaged weights by 1 - decay, whose warm-up is that of the original's LitEma."""
        assert self.recipe.decay is not None
        decay = min(self.recipe.decay, (1 + self.step) / (10 + self.step))
        averaged, weights = cast("list[Tensor]", self.averaged), cast("list[Tensor]", self.weights)
        if has("foreach_lerp"):
            torch._foreach_lerp_(averaged, weights, 1 - decay)
        else:
            torch._foreach_mul_(averaged, decay)
            torch._foreach_add_(averaged, weights, alpha=1 - decay)

    def reset(self) -> None:
        """Begin anew from the present weights, in the memory of the optimiser's state."""
        for state in self.optimiser.state.values():
            for value in state.values():
                value.zero_()
        if self.average is not None:
            self.average.load_state_dict(self.module.state_dict())
        self.scaler = _scaler(self.device) if self.dtype == torch.float16 else None
        self.step = 0

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Write a checkpoint that replaces `path` completely or not at all. settings: JSON values for `restore` to compare."""
        tensors = {f"module.{name}": tensor.detach() for name, tensor in self.module.state_dict().items()}
        if self.average is not None:
            tensors.update({f"average.{name}": tensor for name, tensor in self.average.state_dict().items()})
        updates = 0.0  # fewer than steps where the scaler skipped some
        for name, weight in zip(self.names, self.weights):
            state = self.optimiser.state.get(weight, {})
            updates = float(state.get("step", 0.0))
            tensors.update({f"{moment}.{name}": state[moment] for moment in MOMENTS if moment in state})
        scaler = {} if self.scaler is None else self.scaler.state_dict()
        metadata = {"step": self.step, "updates": updates, "scaler": scaler, "settings": dict(settings)}
        partial = path.with_name(path.name + ".partial")
        # On the CPU: NHWC tensors must be copied, for which a GPU may have no memory left.
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_safetensors(partial, tensors, {"training": json.dumps(metadata)})
        with open(partial, "rb+") as file:  # also after a power failure
            os.fsync(file.fileno())
        os.replace(partial, path)

    def restore(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Continue from a checkpoint of `save`.

        Raises ConfigError if its settings differ, CheckpointError if it is no such file or does not fit.
        """
        file = index(path)
        try:
            metadata = json.loads(file.metadata["training"])
            step, updates, saved = metadata["step"], metadata["updates"], metadata["settings"]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: is no checkpoint of a training; choose another folder") from None
        wanted = json.loads(json.dumps(dict(settings)))
        for name in sorted(wanted.keys() | saved.keys()):
            if wanted.get(name) != saved.get(name):
                raise ConfigError(
                    f"{path} was made with {name} {saved.get(name)}, not {wanted.get(name)}: repeat the former, or choose "
                    "another folder"
                )
        state = read_tensors(file, progress=False)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            kind, _, rest = name.partition(".")
            parts.setdefault(kind, {})[rest] = tensor
        try:
            self.module.load_state_dict(parts["module"])
            if self.average is not None:
                self.average.load_state_dict(parts["average"])
            moments = (
                {
                    i: {
                        "step": torch.tensor(float(updates)),
                        **{moment: _ordered_like(weight, parts[moment][name]) for moment in MOMENTS},
                    }
                    for i, (name, weight) in enumerate(zip(self.names, self.weights))
                }
                if updates
                else {}
            )
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path}: does not fit the model ({' '.join(str(error).split())[:200]})") from None
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
        if self.scaler is not None and metadata["scaler"]:
            self.scaler.load_state_dict(metadata["scaler"])
        self.step = step


def _ordered_like(weight: Tensor, moment: Tensor) -> Tensor:
    """A stored moment in the memory order of its weight, as fused updates read both."""
    return torch.empty_like(weight, device="cpu", dtype=torch.float32).copy_(moment)


def _copy(module: Module) -> Module:
    """A copy without gradients and without compiled or checkpointed forwards, which would run the original."""
    names = ("forward", "denoise")
    replaced = {part: {name: vars(part).pop(name) for name in names if name in vars(part)} for part in module.modules()}
    try:
        return copy.deepcopy(module).requires_grad_(False)
    finally:
        for part, methods in replaced.items():
            vars(part).update(methods)


def _adamw(weights: list[nn.Parameter], recipe: Recipe, device: torch.device) -> torch.optim.AdamW:
    feature = "fused_adamw" if device.type == "cuda" else "cpu_fused_adamw"
    chosen = recipe.optimiser
    if chosen == "auto":
        chosen = "fused" if has(feature) else "foreach"
    if chosen == "fused":
        require(feature, "optimiser fused")
    implementation: dict[str, Any] = {"fused": True} if chosen == "fused" else {"foreach": chosen == "foreach"}
    return torch.optim.AdamW(
        weights, lr=recipe.rate, betas=recipe.betas, weight_decay=recipe.weight_decay, **implementation
    )


def _scaler(device: torch.device) -> Any:
    """Gradient scaler of fp16."""
    if device.type == "cuda" and not has("grad_scaler"):
        return torch.cuda.amp.GradScaler()
    require("grad_scaler", "training in fp16 on the CPU")
    return torch.amp.GradScaler(device.type)
