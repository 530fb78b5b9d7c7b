"""Train the embedded inpainting model on a CPU: `python -m sd.tiny.train_inpaint --work DIR`; resumes from its last checkpoint.

The UNet of the embedded model gets the input channels of an inpainting model, with zero weights, as the released ones did,
and is tuned on drawn images with random holes. Text encoder and autoencoder stay those of the embedded model, so that only
the UNet is exported, fp16, as sd/tiny/tiny-inpaint.safetensors.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sd.checkpoint.layouts import UNET
from sd.choices import EMBEDDED_INPAINTING
from sd.config.presets import UNetConfig, preset
from sd.models.unet import UNet
from sd.pipeline import StableDiffusion
from sd.tiny.shapes import COLOURS, SHAPES, SIZE, TEMPLATES, TRAINED, Subject, draw, recognise
from sd.tiny.train import Bank, Run

CONFIG = preset("tiny-inpaint")
BANK = 32  # images with a hole, encoded per subject before the training
BATCH, RATE, DECAY = 16, 4e-4, 0.998
BORDER = 6  # pixels around the hole of `score`, which covers every shape
UNTOUCHED = 12 / 255  # largest mean difference outside the hole; the autoencoder alone reaches about half of it


def widened(unet: UNet, config: UNetConfig) -> UNet:
    """The UNet with more input channels, whose weights are 0: its output does not depend on them yet."""
    wide, state = UNet(config), unet.state_dict()
    name = "input_blocks.0.0.weight"
    first = torch.zeros_like(wide.state_dict()[name])
    first[:, : unet.config.in_channels] = state[name]
    wide.load_state_dict({**state, name: first})
    return wide


def holes(count: int, generator: torch.Generator) -> Tensor:
    """Random masks [count, 1, SIZE, SIZE] of 0 and 1.

    Half of them cover the shape; the others are rectangles anywhere, half planes, or the whole image.
    """
    masks = torch.zeros(count, 1, SIZE, SIZE)
    y, x = torch.arange(SIZE)[:, None] - SIZE / 2, torch.arange(SIZE) - SIZE / 2
    for mask in masks[:, 0]:
        kind, a, b, c, d = torch.rand(5, generator=generator).tolist()
        if kind < 0.5:
            mask[2 + int(6 * a) : SIZE - 2 - int(6 * b), 2 + int(6 * c) : SIZE - 2 - int(6 * d)] = 1
        elif kind < 0.8:
            height, width = 16 + int(32 * a), 16 + int(32 * b)
            top, left = int((SIZE - height) * c), int((SIZE - width) * d)
            mask[top : top + height, left : left + width] = 1
        elif kind < 0.9:
            mask[:] = ((a - 0.5) * x + (b - 0.5) * y > 0).float()
        else:
            mask[:] = 1
    return masks


@torch.no_grad()
def encode_bank(model: StableDiffusion) -> Bank:
    """Encode BANK images with a hole and all captions of each subject of TRAINED."""
    generator = torch.Generator().manual_seed(8)
    latents, conditions, contexts = [], [], []
    for subject in TRAINED:
        images, masks = draw([subject] * BANK, generator), holes(BANK, generator)
        latents.append(model.encode(images))
        noise = torch.randn(latents[-1].shape, generator=generator)
        cells = F.interpolate(masks, size=noise.shape[2:])
        conditions.append(torch.cat([cells, model.encode(images * (1 - masks), noise)], dim=1))
        contexts.append(model.encode_prompts([subject.caption(t) for t in range(len(TEMPLATES))]))
    empty = model.encode_prompts([""])
    return Bank(torch.stack(latents), torch.stack(contexts), empty, torch.stack(conditions))


def train(work: Path, steps: int) -> UNet:
    """Tune the UNet for `steps` steps; return the averaged weights."""
    model = StableDiffusion.tiny()
    run = Run(work / "unet-inpaint.safetensors", widened(model.unet, CONFIG.unet), steps, BATCH, RATE, DECAY)
    bank = encode_bank(model)

    def evaluate(average: UNet) -> str:
        pipeline = StableDiffusion(CONFIG, average.eval(), model.autoencoder, model.text_encoder)
        return f"correct {score(pipeline, 32)}/32"

    return run.train(functools.partial(bank.loss, run.module, CONFIG, BATCH), evaluate)


def score(model: StableDiffusion, count: int, scale: float = 4.0) -> int:
    """Number of images, of `count`, whose hole has the shape and colour of the prompt and whose rest is untouched.

    Each starts from another shape on the same background; the hole covers the shape.
    """
    generator = torch.Generator().manual_seed(9)
    mask = torch.zeros(SIZE, SIZE)
    mask[BORDER:-BORDER, BORDER:-BORDER] = 1
    correct = 0
    for i in range(count):
        first, second, back = torch.randperm(len(COLOURS), generator=generator)[:3].tolist()
        old, new = torch.randperm(len(SHAPES), generator=generator)[:2].tolist()
        image = draw([Subject(COLOURS[first], SHAPES[old], COLOURS[back])], generator)[0]
        wanted = Subject(COLOURS[second], SHAPES[new], COLOURS[back])
        painted = model.inpaint(wanted.caption(), image, mask, steps=25, scale=scale, seed=i).images[0]
        difference = (painted.permute(2, 0, 1).float() / 127.5 - 1 - image).abs() / 2
        untouched = difference[:, mask == 0].mean() < UNTOUCHED
        correct += bool(untouched) and recognise(painted) == wanted
    return correct


def export(unet: UNet, path: Path = EMBEDDED_INPAINTING) -> None:
    """Write the UNet to a safetensors file under its names in the original layout, fp16."""
    from safetensors.torch import save_file

    tensors = {UNET + name: weight.detach().half().contiguous() for name, weight in unet.state_dict().items()}
    save_file(tensors, str(path), metadata={"made_by": "python -m sd.tiny.train_inpaint", "config": CONFIG.name})
    print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB")


def main(argv: list[str] | None = None) -> None:
    """Train, and export the result."""
    parser = argparse.ArgumentParser(description="Train the embedded inpainting model.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
    parser.add_argument("--output", type=Path, default=EMBEDDED_INPAINTING)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    export(train(options.work, options.steps), options.output)


if __name__ == "__main__":
    main()
