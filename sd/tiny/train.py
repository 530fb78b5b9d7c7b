"""Train the embedded model: `python -m sd.tiny.train --work DIR`. CPU is enough; every stage goes on from its last checkpoint.

Stages, in order:
  autoencoder  KL autoencoder on drawn pictures (L1 and a small KL term); latents are then scaled to unit variance
               per channel inside its own last and first convolutions
  text         the text tower learns to name the caption's colour, shape and background, from the end token and from
               random padding positions alike, and is then frozen: a UNet that has to teach its own text tower learns slowly
  unet         v-prediction (arXiv 2202.00512) with 10 % empty captions for guidance, and an average of the weights
  export       the three networks in the original layout, fp16, as sd/tiny/tiny.safetensors

Every number that matters is a constant below or an option; seeds are fixed, so that a run on the same machine and
torch version repeats.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from sd.choices import EMBEDDED_WEIGHTS
from sd.config.presets import preset
from sd.models.autoencoder import Autoencoder
from sd.models.text_encoder import TextEncoder
from sd.models.tokenizer import tokenize
from sd.models.unet import UNet
from sd.pipeline import StableDiffusion
from sd.sampling.schedule import Schedule
from sd.tiny.shapes import COLOURS, HELD_OUT, SHAPES, SIZE, TEMPLATES, TRAINED, Subject, draw, recognise

CONFIG = preset("tiny")
KL_WEIGHT = 3e-4
CROP, CROPPED = 32, 0.85  # pixels of the crops that the first 85 % of the autoencoder's steps see: four times cheaper
EMPTY_CAPTIONS = 0.1
LATENT_BANK = 64  # pictures drawn and encoded per trained subject before the UNet's training
SAVE_EVERY_SECONDS = 60


@dataclass
class Run:
    """A stage's progress on disk: what is trained, its optimiser, its average, the step it is at."""

    path: Path
    module: nn.Module
    steps: int
    batch: int
    rate: float
    decay: float  # of the average of the weights

    def __post_init__(self):
        self.average = copy.deepcopy(self.module).requires_grad_(False)
        self.optimiser = torch.optim.AdamW(self.module.parameters(), lr=self.rate, weight_decay=1e-4, betas=(0.9, 0.99))
        self.step, self.saved_at = 0, time.monotonic()
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            for name in ("module", "average", "optimiser"):
                getattr(self, name).load_state_dict(state[name])
            self.step = state["step"]

    def save(self) -> None:
        """Write the progress; the old file stays until the new one is whole."""
        state = {name: getattr(self, name).state_dict() for name in ("module", "average", "optimiser")}
        partial = self.path.with_suffix(".partial")
        torch.save({**state, "step": self.step}, partial)
        partial.replace(self.path)
        self.saved_at = time.monotonic()

    def train(self, loss_of, evaluate=None, every: int = 500) -> nn.Module:
        """Minimise loss_of(generator) with warm-up and cosine decay; return the averaged module."""
        start, smoothed = time.monotonic(), None
        while self.step < self.steps:
            # One generator a step, so that a run that was stopped goes on as if it had not been.
            loss = loss_of(torch.Generator().manual_seed(self.step))
            for group in self.optimiser.param_groups:
                group["lr"] = self.rate * min(1.0, (self.step + 1) / 200) * _cosine(self.step / self.steps)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimiser.step()
            self.step += 1
            decay = min(self.decay, (self.step + 1) / (self.step + 10))
            with torch.no_grad():
                torch._foreach_mul_(list(self.average.parameters()), decay)
                torch._foreach_add_(list(self.average.parameters()), list(self.module.parameters()), alpha=1 - decay)
            smoothed = loss.item() if smoothed is None else 0.98 * smoothed + 0.02 * loss.item()
            if self.step % every == 0 or self.step == self.steps:
                note = evaluate(self.average) if evaluate else ""
                seconds = time.monotonic() - start
                print(
                    f"{self.path.stem} {self.step}/{self.steps} loss {smoothed:.4f} {seconds:.0f} s {note}", flush=True
                )
            if time.monotonic() - self.saved_at > SAVE_EVERY_SECONDS or self.step == self.steps:
                self.save()
        return self.average.eval()


def _cosine(fraction: float) -> float:
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fraction))


def _choose(items, count: int, generator: torch.Generator) -> list:
    return [items[i] for i in torch.randint(len(items), (count,), generator=generator).tolist()]


def train_autoencoder(work: Path, steps: int, batch: int = 16) -> Autoencoder:
    """Stage 1. PSNR is that of held-out pictures."""
    run = Run(work / "autoencoder.pt", Autoencoder(CONFIG.autoencoder), steps, batch, rate=2e-3, decay=0.998)
    model = run.module

    def loss_of(generator):
        pictures = draw(_choose(TRAINED, batch, generator), generator)
        if run.step < CROPPED * steps:
            top, left = torch.randint(SIZE - CROP + 1, (2,), generator=generator).tolist()
            pictures = pictures[:, :, top : top + CROP, left : left + CROP]
        mean, log_variance = model.encode(pictures)
        latents = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        return (model.decode(latents) - pictures).abs().mean() + KL_WEIGHT * kl

    @torch.no_grad()
    def evaluate(average):
        pictures = draw(HELD_OUT, torch.Generator().manual_seed(1))
        error = (average.decode(average.encode(pictures)[0]).clamp(-1, 1) - pictures).pow(2).mean()
        return f"PSNR {10 * math.log10(4 / error):.1f} dB"

    return run.train(loss_of, evaluate, every=500)


@torch.no_grad()
def normalise_latents(model: Autoencoder) -> None:
    """Fold the latents' mean and spread into the convolutions next to them: every channel gets mean 0 and variance 1."""
    pictures = draw(_choose(TRAINED, 256, torch.Generator().manual_seed(2)), torch.Generator().manual_seed(3))
    latents = model.encode(pictures)[0]
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    after = model.post_quant_conv
    after.bias += (after.weight * mean[None, :, None, None]).sum((1, 2, 3))
    after.weight *= std[None, :, None, None]
    before = model.quant_conv
    before.weight[:channels] /= std[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()


class CaptionReader(nn.Module):
    """A linear head per attribute over the text tower's states; thrown away after stage 2."""

    def __init__(self):
        super().__init__()
        self.text = TextEncoder(CONFIG.text)
        self.heads = nn.ModuleList(nn.Linear(CONFIG.text.width, n) for n in (len(COLOURS), len(SHAPES), len(COLOURS)))

    def forward(self, tokens, generator):
        states = self.text(tokens)
        end = tokens.argmax(dim=1)  # the end token has the highest number
        padding = end + 1 + (torch.rand(len(tokens), generator=generator) * (tokens.shape[1] - 1 - end)).long()
        rows = torch.arange(len(tokens))
        return [[head(states[rows, position]) for head in self.heads] for position in (end, padding)]


def train_text(work: Path, steps: int, batch: int = 64) -> TextEncoder:
    """Stage 2. Accuracy is that of held-out subjects, all three attributes right."""
    reader = CaptionReader()
    used = _caption_tokens(list(TRAINED + HELD_OUT)).unique()
    with torch.no_grad():  # rows of words that no caption has stay zero: an unknown word says nothing
        known = torch.zeros(CONFIG.text.vocab_size, 1).index_fill_(0, used, 1.0)
        reader.text.token_embedding.weight.mul_(known)
    run = Run(work / "text.pt", reader, steps, batch, rate=3e-3, decay=0.99)
    reader = run.module

    def labels(subjects):
        rows = [(COLOURS.index(s.colour), SHAPES.index(s.shape), COLOURS.index(s.background)) for s in subjects]
        return torch.tensor(rows).unbind(1)

    def loss_of(generator):
        subjects = _choose(TRAINED, batch, generator)
        predictions = reader(_caption_tokens(subjects, generator), generator)
        return sum(F.cross_entropy(p, label) for place in predictions for p, label in zip(place, labels(subjects)))

    @torch.no_grad()
    def evaluate(average):
        generator = torch.Generator().manual_seed(4)
        places = average(_caption_tokens(HELD_OUT, generator), generator)
        right = [torch.stack([p.argmax(1) == t for p, t in zip(place, labels(HELD_OUT))]).all(0) for place in places]
        return "right at the end {:.0%}, at padding {:.0%}".format(*(r.float().mean().item() for r in right))

    text = run.train(loss_of, evaluate, every=100).text
    with torch.no_grad():
        text.token_embedding.weight.mul_(known)
    return text.requires_grad_(False)


def _caption_tokens(subjects, generator: torch.Generator | None = None):
    """Tokens of the subjects' captions in random phrasings, or in the first one without a generator."""
    templates = [0] * len(subjects)
    if generator is not None:  # the plain phrasing half of the time
        templates = (torch.rand(len(subjects), generator=generator) * 2 * len(TEMPLATES)).long() % (2 * len(TEMPLATES))
        templates = [t if t < len(TEMPLATES) else 0 for t in templates.tolist()]
    captions = [subject.caption(template) for subject, template in zip(subjects, templates)]
    return _TOKENS.lookup(captions)


class _TokenCache:
    """Tokenising is slow and captions recur."""

    def __init__(self):
        self.tokens = {}

    def lookup(self, captions):
        new = sorted({caption for caption in captions if caption not in self.tokens})
        if new:
            self.tokens.update(zip(new, tokenize(new, "openclip")))
        return torch.stack([self.tokens[caption] for caption in captions])


_TOKENS = _TokenCache()


def train_unet(work: Path, autoencoder: Autoencoder, text: TextEncoder, steps: int, batch: int = 32) -> UNet:
    """Stage 3. Right colours and shapes are those of held-out subjects at 25 DDIM steps."""
    run = Run(work / "unet.pt", UNet(CONFIG.unet), steps, batch, rate=1e-3, decay=0.999)
    model = run.module
    latents, contexts = _bank(autoencoder, text)
    with torch.no_grad():
        empty = text(tokenize([""], "openclip"))
    alphas = Schedule(CONFIG.schedule).alphas_cumprod.float()

    def loss_of(generator):
        subject = torch.randint(len(TRAINED), (batch,), generator=generator)
        picture = torch.randint(LATENT_BANK, (batch,), generator=generator)
        template = torch.randint(len(TEMPLATES), (batch,), generator=generator)
        x0, context = latents[subject, picture], contexts[subject, template]
        drop = torch.rand(batch, generator=generator) < EMPTY_CAPTIONS
        context = torch.where(drop[:, None, None], empty, context)
        # Stratified timesteps: every batch sees every noise level.
        t = ((torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * len(alphas)).long()
        noise = torch.randn(x0.shape, generator=generator)
        a, b = (root[t][:, None, None, None] for root in (alphas.sqrt(), (1 - alphas).sqrt()))
        return F.mse_loss(model(a * x0 + b * noise, t, context), a * noise - b * x0)

    def evaluate(average):
        pipeline = StableDiffusion(CONFIG, average.eval(), autoencoder, text)
        chosen = _choose(HELD_OUT, 32, torch.Generator().manual_seed(5))
        return score(pipeline, chosen, seed=6)

    return run.train(loss_of, evaluate, every=500)


@torch.no_grad()
def _bank(autoencoder, text):
    """Latents [subjects, LATENT_BANK, 4, 8, 8] and contexts [subjects, phrasings, 77, C] of everything trained on."""
    generator = torch.Generator().manual_seed(7)
    latents, contexts = [], []
    for subject in TRAINED:
        latents.append(autoencoder.encode(draw([subject] * LATENT_BANK, generator))[0])
        contexts.append(text(_TOKENS.lookup([subject.caption(t) for t in range(len(TEMPLATES))])))
    return torch.stack(latents), torch.stack(contexts)


def score(pipeline, subjects: list[Subject], seed: int, scale: float = 4.0) -> str:
    """How many pictures show what they should, attribute by attribute."""
    result = pipeline.txt2img([s.caption() for s in subjects], steps=25, sampler="ddim", scale=scale, seed=seed)
    seen = [recognise(image) for image in result.images]
    pairs = list(zip(seen, subjects))
    counts = {
        a: sum(s is not None and getattr(s, a) == getattr(t, a) for s, t in pairs)
        for a in ("background", "colour", "shape")
    }
    return ", ".join(f"{name} {count}/{len(subjects)}" for name, count in counts.items())


def export(autoencoder, text, unet, path: Path = EMBEDDED_WEIGHTS) -> None:
    """Write the networks as one safetensors file in the original layout, fp16."""
    from safetensors.torch import save_file

    parts = {"model.diffusion_model.": unet, "first_stage_model.": autoencoder, "cond_stage_model.model.": text}
    tensors = {
        prefix + name: tensor.detach().half().contiguous()
        for prefix, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    save_file(tensors, str(path), metadata={"made_by": "python -m sd.tiny.train", "config": "tiny"})
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def main(argv=None) -> None:
    """Run the stages up to `--until`; a finished stage is read from its checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
