"""Train the embedded model on a CPU: `python -m sd.tiny.train --work DIR`. Every stage resumes from its last checkpoint.

Stages, in order:
  autoencoder  KL autoencoder on drawn images (L1 and a small KL term); its last and first convolutions are then scaled
               so that every latent channel has unit variance
  text         the text encoder learns to classify the caption's colour, shape and background at the end token and at
               random padding positions, and is then frozen, which trains the UNet faster than both together
  unet         v-prediction (arXiv 2202.00512) with 10 % empty captions for guidance, and averaged weights
  export       the three networks in the original layout, fp16, as sd/tiny/tiny.safetensors

Seeds are fixed: a run on the same machine and torch version is reproducible.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.choices import EMBEDDED_WEIGHTS
from sd.config.presets import ModelConfig, preset
from sd.models.autoencoder import Autoencoder
from sd.models.text_encoder import TextEncoder
from sd.models.tokenizer import tokenize
from sd.models.unet import UNet
from sd.pipeline import StableDiffusion
from sd.sampling.schedule import Schedule
from sd.tiny.shapes import COLOURS, HELD_OUT, SHAPES, SIZE, TEMPLATES, TRAINED, Subject, draw, recognise
from sd.training import Batch, Recipe, Trainer, denoising_loss, drop_captions

CONFIG = preset("tiny")
KL_WEIGHT = 3e-4
CROP, CROPPED = 32, 0.85  # pixels of the crops in the first 85 % of the autoencoder's steps, which cost a quarter
EMPTY_CAPTIONS = 0.1
LATENT_BANK = 64  # images encoded per subject before the UNet is trained
SAVE_EVERY_SECONDS = 60
Module = TypeVar("Module", bound=nn.Module)
Item = TypeVar("Item")


@dataclass
class Run(Generic[Module]):
    """Training of one module on the CPU, which resumes from its checkpoint."""

    path: Path
    module: Module
    steps: int
    batch: int
    rate: float
    decay: float  # of the averaged weights

    def __post_init__(self) -> None:
        recipe = Recipe(rate=self.rate, betas=(0.9, 0.99), weight_decay=1e-4, decay=self.decay)
        self.trainer, self.saved_at = Trainer(self.module, recipe), time.monotonic()
        if self.path.exists():
            self.trainer.restore(self.path, {})

    @property
    def step(self) -> int:
        """Updates so far."""
        return self.trainer.step

    def train(
        self, loss_of: Callable[[torch.Generator], Tensor], evaluate: Callable[[Module], str], every: int = 500
    ) -> Module:
        """Minimise loss_of(generator) with warm-up and cosine decay; return the averaged module."""
        assert self.trainer.average is not None
        average, start, smoothed = self.trainer.average, time.monotonic(), math.nan
        while self.step < self.steps:
            # A generator for each step, so that a resumed run repeats an uninterrupted one.
            generator = torch.Generator().manual_seed(self.step)
            cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
            rate = self.rate * min(1.0, (self.step + 1) / 200) * cosine
            loss, _ = self.trainer.update([functools.partial(loss_of, generator)], rate)
            smoothed = loss.item() if math.isnan(smoothed) else 0.98 * smoothed + 0.02 * loss.item()
            if self.step % every == 0 or self.step == self.steps:
                progress = f"{self.path.stem} {self.step}/{self.steps} loss {smoothed:.4f}"
                print(f"{progress} {time.monotonic() - start:.0f} s {evaluate(average)}", flush=True)
            if time.monotonic() - self.saved_at > SAVE_EVERY_SECONDS or self.step == self.steps:
                self.trainer.save(self.path, {})
                self.saved_at = time.monotonic()
        return average.eval()


@dataclass
class Bank:
    """Encoded images and captions. latents [subjects, images, 4, 8, 8]; contexts [subjects, templates, 77, C]; empty [1, 77, C].

    conditions: the further input channels of an inpainting model [subjects, images, 5, 8, 8].
    """

    latents: Tensor
    contexts: Tensor
    empty: Tensor
    conditions: Tensor | None = None

    def loss(self, unet: UNet, config: ModelConfig, count: int, generator: torch.Generator) -> Tensor:
        """The denoising loss of `count` random images, of which some have an empty caption."""
        subjects, images = self.latents.shape[:2]
        subject = torch.randint(subjects, (count,), generator=generator)
        sample = torch.randint(images, (count,), generator=generator)
        template = torch.randint(self.contexts.shape[1], (count,), generator=generator)
        latents, context = self.latents[subject, sample], self.contexts[subject, template]
        context = drop_captions(context, self.empty, torch.rand(count, generator=generator) < EMPTY_CAPTIONS)
        alphas = Schedule(config.schedule).alphas_cumprod.float()
        # Stratified timesteps: every batch covers all noise levels.
        t = ((torch.arange(count) + torch.rand(count, generator=generator)) / count * len(alphas)).long()
        noise = torch.randn(latents.shape, generator=generator)
        condition = None if self.conditions is None else self.conditions[subject, sample]
        batch = Batch(latents, context, t, noise, condition)
        return denoising_loss(unet, batch, alphas, config.parameterization == "v")


def _choose(items: Sequence[Item], count: int, generator: torch.Generator) -> list[Item]:
    return [items[i] for i in torch.randint(len(items), (count,), generator=generator).tolist()]


def train_autoencoder(work: Path, steps: int, batch: int = 16) -> Autoencoder:
    """Train stage 1; reports the PSNR of held-out images."""
    run = Run(work / "autoencoder.safetensors", Autoencoder(CONFIG.autoencoder), steps, batch, rate=2e-3, decay=0.998)
    model = run.module

    def loss_of(generator: torch.Generator) -> Tensor:
        images = draw(_choose(TRAINED, batch, generator), generator)
        if run.step < CROPPED * steps:
            top, left = torch.randint(SIZE - CROP + 1, (2,), generator=generator).tolist()
            images = images[:, :, top : top + CROP, left : left + CROP]
        mean, log_variance = model.encode(images)
        latents = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        loss: Tensor = (model.decode(latents) - images).abs().mean() + KL_WEIGHT * kl
        return loss

    @torch.no_grad()
    def evaluate(average: Autoencoder) -> str:
        images = draw(HELD_OUT, torch.Generator().manual_seed(1))
        error = (average.decode(average.encode(images)[0]).clamp(-1, 1) - images).pow(2).mean()
        return f"PSNR {10 * math.log10(4 / error):.1f} dB"

    return run.train(loss_of, evaluate)


@torch.no_grad()
def normalise_latents(model: Autoencoder) -> None:
    """Fold the latents' mean and standard deviation into the adjacent convolutions: each channel gets mean 0, variance 1."""
    images = draw(_choose(TRAINED, 256, torch.Generator().manual_seed(2)), torch.Generator().manual_seed(3))
    latents = model.encode(images)[0]
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    after, before = model.post_quant_conv, model.quant_conv
    assert after.bias is not None and before.bias is not None
    after.bias += (after.weight * mean[None, :, None, None]).sum((1, 2, 3))
    after.weight *= std[None, :, None, None]
    before.weight[:channels] /= std[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()


class CaptionClassifier(nn.Module):
    """Linear classifiers of the attributes over the text encoder's states; discarded after stage 2."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextEncoder(CONFIG.text)
        self.heads = nn.ModuleList(nn.Linear(CONFIG.text.width, n) for n in (len(COLOURS), len(SHAPES), len(COLOURS)))

    def forward(self, tokens: Tensor, generator: torch.Generator) -> list[list[Tensor]]:
        """Return the logits of each attribute at the end token and at a random padding position."""
        states = self.text(tokens)
        end = tokens.argmax(dim=1)  # the end token has the highest id
        padding = end + 1 + (torch.rand(len(tokens), generator=generator) * (tokens.shape[1] - 1 - end)).long()
        rows = torch.arange(len(tokens))
        return [[head(states[rows, position]) for head in self.heads] for position in (end, padding)]


def train_text(work: Path, steps: int, batch: int = 64) -> TextEncoder:
    """Train stage 2; reports the fraction of held-out subjects with all attributes correct."""
    model = CaptionClassifier()
    used = _caption_tokens(list(TRAINED + HELD_OUT)).unique()
    with torch.no_grad():  # rows of tokens that no caption contains stay zero, so that unknown words have no effect
        known = torch.zeros(CONFIG.text.vocab_size, 1).index_fill_(0, used, 1.0)
        model.text.token_embedding.weight.mul_(known)
    run = Run(work / "text.safetensors", model, steps, batch, rate=3e-3, decay=0.99)

    def labels(subjects: Sequence[Subject]) -> tuple[Tensor, ...]:
        rows = [(COLOURS.index(s.colour), SHAPES.index(s.shape), COLOURS.index(s.background)) for s in subjects]
        return torch.tensor(rows).unbind(1)

    def loss_of(generator: torch.Generator) -> Tensor:
        subjects = _choose(TRAINED, batch, generator)
        logits = model(_caption_tokens(subjects, generator), generator)
        losses = [F.cross_entropy(p, label) for position in logits for p, label in zip(position, labels(subjects))]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def evaluate(average: CaptionClassifier) -> str:
        generator = torch.Generator().manual_seed(4)
        logits = average(_caption_tokens(HELD_OUT, generator), generator)
        correct = [torch.stack([p.argmax(1) == t for p, t in zip(at, labels(HELD_OUT))]).all(0) for at in logits]
        return "correct at the end {:.0%}, at padding {:.0%}".format(*(c.float().mean().item() for c in correct))

    text = run.train(loss_of, evaluate, every=100).text
    with torch.no_grad():
        text.token_embedding.weight.mul_(known)
    return text.requires_grad_(False)


def _caption_tokens(subjects: Sequence[Subject], generator: torch.Generator | None = None) -> Tensor:
    """Tokenise captions of random templates, half of them the first; of the first alone without a generator."""
    templates = [0] * len(subjects)
    if generator is not None:
        draws = (torch.rand(len(subjects), generator=generator) * 2 * len(TEMPLATES)).long() % (2 * len(TEMPLATES))
        templates = [t if t < len(TEMPLATES) else 0 for t in draws.tolist()]
    return torch.stack([_tokens(subject.caption(template)) for subject, template in zip(subjects, templates)])


@functools.cache  # tokenising is slow and captions recur
def _tokens(caption: str) -> Tensor:
    tokens: Tensor = tokenize([caption], "openclip")
    return tokens[0]


def train_unet(work: Path, autoencoder: Autoencoder, text: TextEncoder, steps: int, batch: int = 32) -> UNet:
    """Train stage 3; reports the correct attributes of held-out subjects at 25 DDIM steps."""
    run = Run(work / "unet.safetensors", UNet(CONFIG.unet), steps, batch, rate=1e-3, decay=0.999)
    bank = _bank(autoencoder, text)

    def evaluate(average: UNet) -> str:
        pipeline = StableDiffusion(CONFIG, average.eval(), autoencoder, text)
        return score(pipeline, _choose(HELD_OUT, 32, torch.Generator().manual_seed(5)), seed=6)

    return run.train(functools.partial(bank.loss, run.module, CONFIG, batch), evaluate)


@torch.no_grad()
def _bank(autoencoder: Autoencoder, text: TextEncoder) -> Bank:
    """Encode LATENT_BANK images and all captions of each subject of TRAINED."""
    generator = torch.Generator().manual_seed(7)
    latents, contexts = [], []
    for subject in TRAINED:
        latents.append(autoencoder.encode(draw([subject] * LATENT_BANK, generator))[0])
        contexts.append(text(torch.stack([_tokens(subject.caption(t)) for t in range(len(TEMPLATES))])))
    return Bank(torch.stack(latents), torch.stack(contexts), text(tokenize([""], "openclip")))


def score(model: StableDiffusion, subjects: Sequence[Subject], seed: int, scale: float = 4.0) -> str:
    """Count the images whose attributes match the prompts."""
    result = model.txt2img([s.caption() for s in subjects], steps=25, sampler="ddim", scale=scale, seed=seed)
    pairs = list(zip([recognise(image) for image in result.images], subjects))
    counts = {
        a: sum(s is not None and getattr(s, a) == getattr(t, a) for s, t in pairs)
        for a in ("background", "colour", "shape")
    }
    return ", ".join(f"{name} {count}/{len(subjects)}" for name, count in counts.items())


def export(autoencoder: Autoencoder, text: TextEncoder, unet: UNet, path: Path = EMBEDDED_WEIGHTS) -> None:
    """Write the networks to a safetensors file in the original layout, fp16."""
    from safetensors.torch import save_file

    parts = {"model.diffusion_model.": unet, "first_stage_model.": autoencoder, "cond_stage_model.model.": text}
    tensors = {
        prefix + name: tensor.detach().half().contiguous()
        for prefix, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    save_file(tensors, str(path), metadata={"made_by": "python -m sd.tiny.train", "config": "tiny"})
    print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB")


def main(argv: list[str] | None = None) -> None:
    """Run the stages up to `--until`; a finished stage is read from its checkpoint."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--until", choices=("autoencoder", "text", "unet", "export"), default="export")
    parser.add_argument("--autoencoder-steps", type=int, default=8000)
    parser.add_argument("--text-steps", type=int, default=600)
    parser.add_argument("--unet-steps", type=int, default=12000)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
    parser.add_argument("--output", type=Path, default=EMBEDDED_WEIGHTS)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    autoencoder = train_autoencoder(options.work, options.autoencoder_steps)
    normalise_latents(autoencoder)
    if options.until == "autoencoder":
        return
    text = train_text(options.work, options.text_steps)
    if options.until == "text":
        return
    unet = train_unet(options.work, autoencoder, text, options.unet_steps)
    if options.until == "export":
        export(autoencoder, text, unet, options.output)


if __name__ == "__main__":
    main()
