"""Textual-inversion embeddings: learned vectors in place of the token of a new word (arXiv 2208.01618).

Forms of a file, .safetensors or torch:
- diffusers: {token: [width] or [n, width]}
- AUTOMATIC1111: {"string_to_param": {"*": [n, width]}, "name": ...}, or {"emb_params": [n, width]}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sd.checkpoint.file_formats import index, read_tensors
from sd.errors import CheckpointError, ConfigError, listed

_NAMELESS = ("emb_params", "*")  # keys that are no token


@dataclass(frozen=True)
class Embedding:
    """A word of prompts, and the float32 vectors [n, width] of its n tokens."""

    token: str
    vectors: Tensor


def read_embedding(path: str | Path, width: int, token: str | None = None) -> Embedding:
    """Read an embedding for a text encoder of `width`.

    token: the word; None for the one in a file of diffusers' form, otherwise the file's name without its extension.
    Raises CheckpointError, naming the file, if it is damaged or for another model.
    """
    file_index = index(path)
    names = list(file_index.tensors)
    if "clip_g" in names or "clip_l" in names:
        raise CheckpointError(
            f"{path}: is an embedding for Stable Diffusion XL ({', '.join(names)}); use one of SD1 or SD2"
        )
    if len(names) != 1:
        raise CheckpointError(
            f"{path}: has {len(names)} tensors ({listed(names, 5)}), an embedding has one; give such a file"
        )
    vectors = read_tensors(file_index, progress=False)[names[0]]
    if vectors.dim() not in (1, 2) or not vectors.numel() or not vectors.is_floating_point():
        raise CheckpointError(
            f"{path}: {names[0]} is {tuple(vectors.shape)} {vectors.dtype}, not [n, {width}] of floating-point numbers"
        )
    if vectors.shape[-1] != width:
        models = {768: " of SD1", 1024: " of SD2"}
        raise CheckpointError(
            f"{path}: its vectors have width {vectors.shape[-1]}{models.get(vectors.shape[-1], '')}, and the text encoder "
            f"has {width}{models.get(width, '')}; use an embedding trained for this model"
        )
    vectors = vectors.reshape(-1, width).float()
    if not bool(torch.isfinite(vectors).all()):
        raise CheckpointError(f"{path}: its vectors are not finite; download the file again")
    own = Path(path).stem if names[0] in _NAMELESS else names[0]
    return Embedding(own if token is None else token, vectors)


def require_new_token(token: str, tokens: Mapping[str, object]) -> None:
    """Raise ConfigError for a token that a prompt cannot contain, or that an earlier embedding has."""
    if not token.strip() or token != token.strip():
        raise ConfigError(f"embedding token {token!r}: must be a word without spaces around it")
    if token in tokens:
        raise ConfigError(f"embedding token {token!r}: is loaded already; pass another token")
