"""Contents of a checkpoint, from its index alone: no weights are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sd.checkpoint import layouts
from sd.checkpoint.detect import Prediction, config_with, recorded_prediction
from sd.checkpoint.diffusers_reader import SCHEDULER, parameterization, recorded_scheduler
from sd.checkpoint.file_formats import index, itemsize
from sd.checkpoint.load import read_checkpoint
from sd.checkpoint.spellings import prefixes
from sd.config.presets import ModelConfig
from sd.errors import listed

NETWORKS = ("unet", "autoencoder", "text_encoder")
ASSUMPTION = "does not record its prediction type, and is taken for a model of"
_SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


def prediction_of(path: str | Path) -> Prediction | None:
    """Prediction type that a file or folder records, and where."""
    path = Path(path)
    if not path.is_dir():
        return recorded_prediction(index(path))
    predicted = parameterization(path)
    return None if predicted is None else Prediction(predicted, f"scheduler ({SCHEDULER})")


def describe_prediction(path: str | Path, config: ModelConfig) -> str:
    """One line: the prediction type of a model loaded from `path`, and how to change one that is assumed."""
    recorded = prediction_of(path)
    if recorded is not None:
        return f"predicts {config.parameterization}, by its {recorded.source}"
    other = config_with(config, "v" if config.parameterization == "eps" else "eps")
    beside = Path(path).with_suffix(".yaml")  # which A1111 reads
    settings = f"; {beside.name} beside it is read only as --config {beside}" if beside.is_file() else ""
    return (
        f"assumed to predict {config.parameterization}, which the file does not record; "
        f"if the images are noise, pass {other}{settings}"
    )


def summary(
    path: str | Path, vae: str | Path | None = None, text_encoder: str | Path | None = None, strict: bool = True
) -> list[str]:
    """Lines on a checkpoint: format and layout, each network with its tensors, parameters and precisions, other entries.

    vae, text_encoder, strict: as in `read_checkpoint`.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path, vae=vae, text_encoder=text_encoder, strict=strict, shapes_only=True)
    state = checkpoint.state
    lines = [
        f"format: {_format(path)}, {_size(path) / 2**20:.1f} MiB",
        f"layout: {_layout(path, state, checkpoint.names)}",
    ]
    for network in NETWORKS:
        weights = {name: weight for name, weight in state.items() if name.startswith(prefixes(network))}
        lines.append(f"{network}: {_weights(weights) if weights else 'none'}")
    if checkpoint.prediction is not None:
        lines.append(f"predicts: {checkpoint.prediction.parameterization}, by its {checkpoint.prediction.source}")
    if path.is_dir() and (scheduler := recorded_scheduler(path)) is not None:
        lines.append(f"scheduler: {scheduler}")
    if checkpoint.global_step is not None:
        lines.append(f"training steps: {checkpoint.global_step}")
    if ema := [name for name in state if name.startswith("model_ema.")]:
        lines.append(f"averaged weights (model_ema): {len(ema)} tensors, not used")
    own = ("model_ema.", *(prefix for network in NETWORKS for prefix in prefixes(network)))
    if extra := [*(name for name in state if not name.startswith(own)), *checkpoint.others]:
        lines.append(f"other entries: {listed(extra)}")
    return lines


def _format(path: Path) -> str:
    if path.is_dir():
        return "folder"
    return {"safetensors": ".safetensors", "torch": "torch file (.ckpt), of which nothing is executed"}[
        index(path).file_format
    ]


def _size(path: Path) -> int:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _layout(path: Path, state: Mapping[str, Tensor], names: tuple[str, ...]) -> str:
    if path.is_dir():
        return "diffusers"
    renamed = "" if set(state) <= set(names) else ", in the names of another tool"
    return ("native-mha" if layouts.is_native_mha(state) else "original") + renamed


def _weights(weights: Mapping[str, Tensor]) -> str:
    counts = Counter(weight.dtype for weight in weights.values())
    precisions = ", ".join(f"{count} {_SHORT.get(dtype, str(dtype)[6:])}" for dtype, count in counts.most_common())
    parameters = sum(weight.numel() for weight in weights.values())
    size = sum(weight.numel() * itemsize(weight.dtype) for weight in weights.values())
    return f"{len(weights)} tensors ({precisions}), {parameters / 1e6:.1f} M parameters, {size / 2**20:.1f} MiB"
