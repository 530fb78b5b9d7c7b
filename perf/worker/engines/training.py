"""Engine of the workload `train`: optimiser steps of the UNet of `sd` or of diffusers, through sd.training in both cases.

A round is `steps` updates on fixed latents and contexts, from the same initial weights each time. Images and captions are
not encoded in a round: the input of a UNet in training is noise of any images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perf.worker.clock import synchronize
from perf.worker.engines import compat
from perf.worker.engines.interface import Output
from perf.worker.engines.sd import load_model
from sd import Optimisations
from sd.errors import Unavailable

RATE = 1e-4  # of AdamW, from the first step on; the original's, after its warm-up


class TrainingEngine:
    """Optimiser steps of one UNet."""

    after_step: Callable[[int, int], None] | None = None  # progress callback of each update

    def __init__(self, configuration: Any):
        of_inference = {"optimise": "", "lora_rank": 0, "compile_scope": "unet", "compile_backend": "inductor"}
        chosen = [name for name, default in of_inference.items() if getattr(configuration, name) != default]
        if chosen:
            raise Unavailable(f"workload train: {', '.join(chosen)} of the configuration is of inference: leave it out")
        self.configuration, device = configuration, configuration.device
        self.device = torch.device(device)
        self.training = compat.load("training")
        attention = compat.load("Attention")
        kernels = {"kernels": tuple(configuration.sdpa_kernels)} if configuration.sdpa_kernels else {}
        self.recipe = self.training.Recipe(
            rate=RATE,
            precision=configuration.precision,
            compile=configuration.compile,
            checkpointing=configuration.checkpointing,
            attention=attention(configuration.attention, **kernels),
        )
        self.precision, self.compiles = configuration.precision, configuration.compile != "none"
        model = load_model(configuration, device, Optimisations(attention="original", precision="full"))
        self.config = model.config
        height, width = configuration.height or None, configuration.width or None
        self.shape = model.latent_shape(configuration.batch, height, width)
        generator = torch.Generator().manual_seed(configuration.seed)
        further = self.config.unet.in_channels - self.shape[1]  # of an inpainting or a depth model
        self.latents = torch.randn(self.shape, generator=generator).to(self.device)
        condition = torch.randn(self.shape[0], further, *self.shape[2:], generator=generator)
        self.condition = condition.to(self.device) if further else None
        self.context = model.encode_prompts([configuration.prompt] * configuration.batch)
        self.alphas = model.schedule.alphas_cumprod.float().to(self.device)
        unet = model.unet
        del model
        self.call = self._ours(unet) if configuration.engine == "sd" else self._diffusers(unet)
        self.initial = {name: tensor.detach().cpu().clone() for name, tensor in self.module.state_dict().items()}
        self.trainer = self.training.Trainer(self.module, self.recipe, self.device)

    def _ours(self, unet: Any) -> Callable[..., Tensor]:
        self.module = self.training.prepare_unet(unet, self.recipe, self.device)
        return unet

    def _diffusers(self, unet: Any) -> Callable[..., Tensor]:
        """diffusers' UNet with the same weights, prepared as its example script does."""
        from perf.worker.engines.diffusers import training_unet

        self.module, call = training_unet(unet, self.config, self.configuration, self.device)
        return call

    def prepare(self, seed: int) -> None:
        """Return to the initial weights, and draw the noise and timesteps of a round. Untimed."""
        self.module.load_state_dict(self.initial)
        self.trainer.reset()
        generator = torch.Generator().manual_seed(seed)
        self.batches = []
        for _ in range(self.configuration.steps):
            timesteps = torch.randint(len(self.alphas), self.shape[:1], generator=generator)
            noise = torch.randn(self.shape, generator=generator)
            batch = self.training.Batch(
                self.latents, self.context, timesteps.to(self.device), noise.to(self.device), self.condition
            )
            self.batches.append(batch)
        synchronize()

    def round(self, seed: int) -> Output:
        """The updates; their losses, gradient norms and change of the weights are the output that is checked."""
        clock = compat.load("StageClock")(self.device)
        predicts_v, traced = self.config.parameterization == "v", []
        for i, batch in enumerate(self.batches):
            loss = lambda batch=batch: self.training.denoising_loss(self.call, batch, self.alphas, predicts_v)  # noqa: E731
            traced.append(torch.stack(self.trainer.update([loss], stage=clock.stage)))
            if self.after_step is not None:
                self.after_step(i + 1, len(self.batches))
        trace = torch.stack(traced).T.flatten().float().cpu()
        return Output(trace[None], None, clock.seconds(), len(self.batches))
