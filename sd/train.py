"""Fine-tuning: `python -m sd.train --data FOLDER --output FOLDER --steps 1000`; the same command resumes.

Each image needs a caption: NAME.txt beside NAME.png, or a line of metadata.jsonl with `file_name` and `text`.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from sd.choices import ATTENTION, COMPILE_MODES, OPTIMISERS, PRECISIONS
from sd.cli.startup import exit_on_interrupt

if TYPE_CHECKING:  # functions import what imports torch, which Ctrl-C may interrupt
    from sd.training import Recipe


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    from sd.cli.arguments import natural, nonnegative, positive, size

    result = argparse.ArgumentParser(prog="python -m sd.train", description="Fine-tune the UNet.", allow_abbrev=False)
    add = result.add_argument
    add("--data", required=True, metavar="FOLDER", help="images with captions in NAME.txt or metadata.jsonl")
    add("--output", required=True, metavar="FOLDER", help="folder of the checkpoint, the loss and the trained model")
    add("--ckpt", metavar="FILE", help=".ckpt, .safetensors or diffusers folder (default: the embedded tiny model)")
    add("--config", help="a preset or a YAML file in the original layout (default: detected from the weights)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if available)")
    add("--steps", type=positive, default=1000, help="updates in total (default: %(default)s)")
    add("--batch", type=positive, default=4, help="images per process and part of an update (default: %(default)s)")
    add(
        "--accumulate",
        type=positive,
        default=1,
        help="parts of an update, whose gradients are accumulated (default: 1)",
    )
    add("--size", type=size, help="pixels of the square images (default: the model's)")
    add("--seed", type=natural, default=0, help="of the order of images, noise and timesteps (default: 0)")
    add("--rate", type=nonnegative, default=1e-5, help="learning rate (default: %(default)s; the originals: 1e-4)")
    add("--warm-up", type=natural, default=100, help="steps of linear warm-up (default: %(default)s)")
    add("--weight-decay", type=nonnegative, default=1e-2, help="of AdamW (default: %(default)s)")
    add("--max-gradient-norm", type=nonnegative, default=1.0, help="0 for no limit (default: %(default)s)")
    add(
        "--ema-decay", type=_fraction, default=0.9999, help="of the averaged weights, 0 for none (default: %(default)s)"
    )
    add("--caption-dropout", type=_fraction, default=0.1, help="fraction of empty captions (default: %(default)s)")
    add("--snr-gamma", type=nonnegative, default=0.0, help="min-SNR weights, usually 5; 0 for none (default: 0)")
    add(
        "--encode",
        choices=("once", "step"),
        default="once",
        help="encode images and captions before the training, or in each step, which needs less memory (default: once)",
    )
    add("--precision", choices=PRECISIONS, help="weights stay fp32 (default: autocast on CUDA and full on a CPU)")
    add("--attention", choices=ATTENTION, help="default: sdpa where this torch has it, else original")
    add("--compile", nargs="?", const="default", default="none", choices=COMPILE_MODES, help="torch.compile the UNet")
    add("--checkpointing", action="store_true", help="recompute blocks in the backward pass: less memory, more time")
    add("--channels-last", action="store_true", help="NHWC convolutions")
    add("--optimiser", choices=OPTIMISERS, default="auto", help="implementation of AdamW (default: the fastest here)")
    add(
        "--save-every", type=positive, default=200, metavar="N", help="steps between checkpoints (default: %(default)s)"
    )
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 2 for an error of the user or a loss that diverged, 130 if interrupted."""
    with exit_on_interrupt():
        from sd.cli.run import guarded
        from sd.cli.training_run import run
    args = parser().parse_args(argv)
    return guarded(lambda: run(args, recipe(args), os.environ), "--checkpointing, a smaller --batch")


def recipe(args: argparse.Namespace) -> Recipe:
    """The Recipe of the options; the default precision depends on the device."""
    from sd.attention.functions import DEFAULT_ATTENTION, Attention
    from sd.cli.setup import device_named
    from sd.training import Recipe

    usual = "autocast" if device_named(args.device).type == "cuda" else "full"
    return Recipe(
        rate=args.rate,
        weight_decay=args.weight_decay,
        optimiser=args.optimiser,
        max_gradient_norm=args.max_gradient_norm or None,
        decay=args.ema_decay or None,
        precision=args.precision or usual,
        attention=Attention(args.attention or DEFAULT_ATTENTION),
        compile=args.compile,
        checkpointing=args.checkpointing,
        channels_last=args.channels_last,
    )


def _fraction(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0 and below 1")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
