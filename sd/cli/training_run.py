"""The run of sd.train: images with captions, the loop with its checkpoints, the loss curve, the trained model."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import random
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as distributed
from torch import Tensor

from sd.checkpoint.file_formats import write_safetensors
from sd.checkpoint.layouts import join_networks
from sd.checkpoint.spellings import V_PREDICTION_MARKERS
from sd.cli.examples import Examples, read_examples
from sd.cli.setup import device_named, set_threads
from sd.config.presets import INPUTS
from sd.errors import ConfigError, Diverged, SDWarning
from sd.models.unet import UNet
from sd.networks import resolve_config
from sd.optimise.optimisations import Optimisations
from sd.pipeline import StableDiffusion
from sd.training import Batch, Recipe, Trainer, denoising_loss, drop_captions, prepare_unet, sample_latents

CHECKPOINT, MODEL, CURVE, PLOT = "training.safetensors", "model.safetensors", "loss.csv", "loss.png"
COLUMNS = ("step", "loss", "gradient_norm", "rate")
READ_EVERY = 10  # steps between readings of the loss, which wait for the device
ENCODED_TOGETHER = 4  # images, before the training
# Options that change neither the result nor its order; `batch` and `accumulate` do by their product alone.
FREE = (
    *("steps", "save_every", "output", "data", "device", "encode", "compile", "checkpointing", "channels_last"),
    *("optimiser", "attention", "batch", "accumulate", "ckpt"),
)


@dataclass(frozen=True)
class Processes:
    """This process among those of torchrun."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, device: torch.device, environ: Mapping[str, str]) -> Processes:
        """Join the group of torchrun, or be alone."""
        if "WORLD_SIZE" not in environ:
            return cls()
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(distributed.get_rank(), distributed.get_world_size())

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values / self.count

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            distributed.barrier()


class Source:
    """The batches of a training: the same for any number of processes and accumulated parts."""

    def __init__(self, pipe: StableDiffusion, examples: Examples, args: Namespace, processes: Processes):
        self.pipe, self.examples, self.processes = pipe, examples, processes
        self.seed, self.part, self.dropout = args.seed, args.batch, args.caption_dropout
        self.parts, self.size = args.accumulate, args.size or pipe.config.image_size
        self.images = self.part * self.parts * processes.count  # of an update
        self.empty = pipe.encode_prompts([""])
        self.moments: Tensor | None = None
        self.contexts: dict[str, Tensor] = {}
        if args.encode == "once":
            self._encode_all()

    def _encode_all(self) -> None:
        from tqdm import tqdm

        numbers = list(range(len(self.examples.paths)))
        bar = tqdm(numbers[::ENCODED_TOGETHER], "encoding", unit="batch", disable=self.processes.rank > 0)
        moments = [self._encode_images(numbers[i : i + ENCODED_TOGETHER]) for i in bar]
        self.moments = torch.cat([part.cpu() for part in moments])
        for caption in dict.fromkeys(self.examples.captions):
            self.contexts[caption] = self.pipe.encode_prompts([caption]).cpu()

    @torch.no_grad()
    def _encode_images(self, numbers: list[int]) -> Tensor:
        """Mean and log variance of the latents: [B, 2, C, h, w]."""
        images = torch.stack([self.examples.image(i, self.size) for i in numbers]).to(self.pipe.device)
        return torch.stack(self.pipe.autoencoder.encode(images), dim=1)

    def batches(self, step: int) -> list[Callable[[], Batch]]:
        """The parts of this process of an update. Random numbers are those of the whole update, drawn on the CPU."""
        generator = torch.Generator().manual_seed(_derived(self.seed, "step", step))
        side = self.size // self.pipe.config.autoencoder.downsampling
        shape = self.images, self.pipe.config.autoencoder.embed_dim, side, side
        drawn = {
            "timesteps": torch.randint(len(self.pipe.schedule), (self.images,), generator=generator),
            "noise": torch.randn(shape, generator=generator),
            "posterior": torch.randn(shape, generator=generator),
            "dropped": torch.rand(self.images, generator=generator) < self.dropout,
        }
        numbers = [self._image(step * self.images + i) for i in range(self.images)]
        parts: list[Callable[[], Batch]] = []
        for part in range(self.parts):
            start = (part * self.processes.count + self.processes.rank) * self.part
            rows = slice(start, start + self.part)
            own = {name: values[rows] for name, values in drawn.items()}
            parts.append(partial(self._batch, numbers[rows], **own))
        return parts

    def _image(self, position: int) -> int:
        """The image at a position of the training, in which each epoch has an order of its own."""
        count = len(self.examples.paths)
        epoch, place = divmod(position, count)
        return _shuffled(count, _derived(self.seed, "epoch", epoch))[place]

    @torch.no_grad()
    def _batch(self, numbers: list[int], timesteps: Tensor, noise: Tensor, posterior: Tensor, dropped: Tensor) -> Batch:
        device = self.pipe.device
        captions = [self.examples.captions[i] for i in numbers]
        if self.moments is None:
            moments, context = self._encode_images(numbers), self.pipe.encode_prompts(captions)
        else:
            moments = self.moments[numbers].to(device)
            context = torch.cat([self.contexts[caption] for caption in captions]).to(device)
        mean, log_variance = moments.unbind(1)
        latents = sample_latents(mean, log_variance, posterior.to(device), self.pipe.config.scale_factor)
        context = drop_captions(context, self.empty, dropped.to(device))
        return Batch(latents, context, timesteps.to(device), noise.to(device))


def _derived(*parts: object) -> int:
    """A seed of 32 bits, all that PyTorch's CPU generator uses."""
    return random.Random(" ".join(map(str, parts))).getrandbits(32)


_orders: dict[tuple[int, int], list[int]] = {}  # of the current epoch alone


def _shuffled(count: int, seed: int) -> list[int]:
    if (count, seed) not in _orders:
        if len(_orders) > 1:  # a batch may span two epochs
            _orders.clear()
        _orders[count, seed] = random.Random(seed).sample(range(count), count)
    return _orders[count, seed]


@dataclass
class Curve:
    """The loss by step, in a CSV file and a plot; rows after the checkpoint are dropped on resuming."""

    folder: Path
    rows: list[tuple[int, float, float, float]] = field(default_factory=list)

    def resume(self, step: int) -> None:
        """Read the rows up to a step, and rewrite the file without the others."""
        try:
            with open(self.folder / CURVE, newline="", encoding="utf-8") as file:
                lines = list(csv.reader(file))[1:]
        except FileNotFoundError:
            lines = []
        for line in lines:
            try:
                number, (loss, norm, rate) = int(line[0]), map(float, line[1:])
            except (IndexError, ValueError):  # a line that a kill cut off
                continue
            if number <= step:
                self.rows.append((number, loss, norm, rate))
        partial_file = self.folder / (CURVE + ".partial")
        with open(partial_file, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *self.rows])
        os.replace(partial_file, self.folder / CURVE)

    def add(self, rows: list[tuple[int, float, float, float]]) -> None:
        """Append rows to the file."""
        self.rows += rows
        with open(self.folder / CURVE, "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)

    def draw(self) -> None:
        """Plot each loss and their moving average; warns where matplotlib is not installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            warnings.warn(f"{PLOT}: needs matplotlib (pip install -e '.[report]'); {CURVE} has the data", SDWarning, 2)
            return
        steps, losses = [row[0] for row in self.rows], [row[1] for row in self.rows]
        width = max(1, len(losses) // 20)
        sums = [0.0]
        for loss in losses:
            sums.append(sums[-1] + loss)
        means = [(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width) for i in range(len(losses))]
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, losses, linewidth=0.6, alpha=0.4, label="each step")
        axes.plot(steps, means, linewidth=1.6, label=f"mean of {width} steps")
        axes.set(xlabel="step", ylabel="loss (mean squared error)", ylim=(0, None))
        axes.legend()
        figure.savefig(self.folder / PLOT, dpi=100)


def run(args: Namespace, recipe: Recipe, environ: Mapping[str, str]) -> None:
    """Train up to --steps, from the checkpoint in --output if there is one, and write the model with averaged weights."""
    examples = read_examples(Path(args.data))
    device = device_named(args.device)
    if "LOCAL_RANK" in environ and device.type == "cuda":
        device = device_named(f"cuda:{environ['LOCAL_RANK']}")
    processes = Processes.join(device, environ)
    if device.type == "cpu":
        threads = set_threads(environ)  # torchrun sets OMP_NUM_THREADS for its processes
        if processes.rank == 0:
            print(threads)
    pipe = _load(args, device)
    source = Source(pipe, examples, args, processes)
    trainer = Trainer(prepare_unet(pipe.unet, recipe, device), recipe, device)
    folder = Path(args.output)
    settings = _settings(args, examples, source.images, recipe)
    _open(folder, processes)
    if (folder / CHECKPOINT).exists():
        trainer.restore(folder / CHECKPOINT, settings)
    curve = Curve(folder)
    if processes.rank == 0:
        curve.resume(trainer.step)
        print(f"{len(examples.paths)} images, {source.images} per update; step {trainer.step} of {args.steps}")
    _Loop(args, pipe, trainer, source, curve, settings).run()
    if processes.rank == 0:
        curve.draw()
        _write_model(pipe, trainer, folder / MODEL)
        print(folder / MODEL)
    processes.wait()


def _load(args: Namespace, device: torch.device) -> StableDiffusion:
    optimisations = Optimisations()
    if args.ckpt is None:
        if args.config is not None:
            raise ConfigError(f"--config {args.config} needs its checkpoint: pass --ckpt FILE, or neither")
        pipe = StableDiffusion.tiny(device, optimisations)
    else:
        pipe = StableDiffusion.from_checkpoint(args.ckpt, resolve_config(args.config), device, optimisations)
    if pipe.unet.embeds_guidance:
        raise ConfigError(
            "--ckpt: a latent consistency model is distilled, not trained by this loss: use its base model"
        )
    if pipe.config.unet.in_channels != pipe.config.autoencoder.embed_dim:
        kind = INPUTS.get(pipe.config.unet.in_channels, "another")
        raise ConfigError(f"--ckpt: {kind} model needs further inputs, which --data has not: use a text-to-image model")
    return pipe


def _settings(args: Namespace, examples: Examples, images: int, recipe: Recipe) -> dict[str, object]:
    """What a resumed training must have in common with the checkpoint."""
    content = json.dumps([[path.name for path in examples.paths], examples.captions])
    return {
        **{f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in FREE},
        "--precision": recipe.precision,
        "--ckpt": Path(args.ckpt).name if args.ckpt else None,
        "images per update (--batch)": images,
        "images and captions (--data)": hashlib.sha256(content.encode()).hexdigest()[:16],
        "nn.MultiheadAttention (--attention mha)": recipe.attention.implementation == "mha",
    }


def _open(folder: Path, processes: Processes) -> None:
    if processes.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / (CHECKPOINT + ".partial")).unlink(missing_ok=True)  # of a killed process
        except OSError as error:
            raise ConfigError(f"--output {folder}: cannot be written ({error.strerror})") from None
    processes.wait()


def _write_model(pipe: StableDiffusion, trainer: Trainer[UNet], path: Path) -> None:
    """Write the whole model with the averaged weights, in the original layout, completely or not at all."""
    if trainer.average is not None:
        pipe.unet.load_state_dict(trainer.average.state_dict())
    networks: dict[str, dict[str, Tensor]] = {"unet": {}, "autoencoder": {}, "text_encoder": {}}
    for name, weight in pipe.state_dict().items():
        network, _, rest = name.partition(".")
        networks[network][rest] = weight.detach()
    state = join_networks(networks, pipe.config.text.kind)
    if pipe.config.parameterization == "v":
        state[V_PREDICTION_MARKERS[0]] = torch.empty(0)
    partial_file = path.with_name(path.name + ".partial")
    write_safetensors(partial_file, state, {"format": "pt", "global_step": str(trainer.step)})
    os.replace(partial_file, path)


@dataclass
class _Loop:
    """Updates up to --steps, with a reading of the loss every few steps."""

    args: Namespace
    pipe: StableDiffusion
    trainer: Trainer[UNet]
    source: Source
    curve: Curve
    settings: Mapping[str, object]

    def run(self) -> None:
        """Train. Raises Diverged at a loss that is not finite, before it is in any checkpoint."""
        from tqdm import tqdm

        trainer, steps, quiet = self.trainer, self.args.steps, self.source.processes.rank > 0
        alphas = self.pipe.schedule.alphas_cumprod.float().to(self.pipe.device)
        predicts_v, gamma = self.pipe.config.parameterization == "v", self.args.snr_gamma or None
        unread: list[tuple[float, Tensor, Tensor]] = []
        began, before = time.monotonic(), trainer.step
        self.saved = trainer.step if trainer.step else None
        with tqdm(total=steps, initial=trainer.step, unit="step", file=sys.stderr, disable=quiet) as bar:
            while trainer.step < steps:
                losses = [
                    lambda batch=batch: denoising_loss(trainer.model, batch(), alphas, predicts_v, gamma)
                    for batch in self.source.batches(trainer.step)
                ]
                rate = self.args.rate * min(1.0, (trainer.step + 1) / max(1, self.args.warm_up))
                unread.append((rate, *trainer.update(losses, rate)))
                saving = trainer.step % self.args.save_every == 0 or trainer.step == steps
                if saving or trainer.step % READ_EVERY == 0:
                    loss = self._read(unread)
                    unread = []
                    speed = (trainer.step - before) * self.source.images / (time.monotonic() - began)
                    bar.set_postfix_str(f"loss {loss:.4f}, {speed:.3g} images/s", refresh=False)
                if saving and not quiet:
                    trainer.save(self.curve.folder / CHECKPOINT, self.settings)
                self.saved = trainer.step if saving else self.saved
                bar.update()

    def _read(self, unread: list[tuple[float, Tensor, Tensor]]) -> float:
        """Append the losses to the curve; return the last one."""
        pairs = torch.stack([torch.stack(pair) for _, *pair in unread])
        values: list[tuple[float, float]] = self.source.processes.mean(pairs).tolist()
        first = self.trainer.step - len(unread) + 1
        rows = [(first + i, loss, norm, unread[i][0]) for i, (loss, norm) in enumerate(values)]
        # With a gradient scaler the norm may be infinite: that update was skipped.
        good = [math.isfinite(row[1]) and (math.isfinite(row[2]) or self.trainer.scaler is not None) for row in rows]
        count = good.index(False) if False in good else len(rows)
        if self.source.processes.rank == 0:
            self.curve.add(rows[:count])
        if count < len(rows):
            step, loss, norm, _ = rows[count]
            state = (
                f"{self.curve.folder / CHECKPOINT} has step {self.saved}"
                if self.saved
                else "there is no checkpoint yet"
            )
            raise Diverged(
                f"step {step}: loss {loss:g}, gradient norm {norm:g}; {state}: lower --rate, or choose --precision full or bf16"
            )
        return rows[-1][1]
