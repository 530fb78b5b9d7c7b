"""Prompts to tokens, by the tokenizer of open_clip_torch (its vocabulary ships inside that package)."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

START, END = 49406, 49407  # <|startoftext|>, <|endoftext|>
CHUNK = 75  # tokens of a prompt between START and END


@functools.cache
def _open_clip_tokenizer() -> ModuleType:
    """open_clip's module `tokenizer`, loaded without the package around it.

    `import open_clip` imports torchvision, timm and torch._dynamo, which takes longer than loading SD's own weights.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("the package open_clip_torch is not installed: pip install open_clip_torch")
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("_open_clip_tokenizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Tokens:
    """Tokens of prompts. ids: int64 [B, chunks, 77]. lengths: tokens of each whole prompt. dropped: text after the last
    chunk of each prompt, in the tokenizer's spelling; empty where the whole prompt is in `ids`.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    dropped: tuple[str, ...]


def tokenize(prompts: list[str], encoder: str = "openclip", added: Mapping[str, range] = {}) -> Tensor:
    """prompts -> [B, 77] int64: start, at most 75 tokens, end, padding.

    encoder: `openclip` (SD2) pads with 0, `clip` (SD1) with the end token. A longer prompt is truncated, and its last token
    becomes the end token, as in both originals.
    added: words of textual-inversion embeddings (case-sensitive, not inside longer words) and their token ids.
    """
    return tokenize_chunks(prompts, encoder, added=added).ids[:, 0]


def tokenize_chunks(
    prompts: list[str], encoder: str = "openclip", chunks: int | None = 1, added: Mapping[str, range] = {}
) -> Tokens:
    """Tokens of each prompt in `chunks` chunks of 75, each with its own start, end and padding as in `tokenize`.

    chunks: None for as many as the longest prompt needs. Chunks after the end of a prompt are those of the empty prompt. This
    is the splitting of compel, and of AUTOMATIC1111's web UI where it looks for no comma and splits no embedding. added: as
    in `tokenize`.
    """
    tokenizer = _open_clip_tokenizer()
    encoded = [_encode(prompt, added) for prompt in prompts]
    lengths = tuple(map(len, encoded))
    if chunks is None:
        chunks = max(1, -(-max(lengths) // CHUNK))
    ids = torch.full((len(prompts), chunks, CHUNK + 2), END if encoder == "clip" else 0)
    ids[:, :, 0] = START
    for row, tokens in zip(ids, encoded):
        for i, chunk in enumerate(row):
            part = [*tokens[i * CHUNK : (i + 1) * CHUNK], END]
            chunk[1 : len(part) + 1] = torch.tensor(part)
    # Tokens of embeddings have no spelling but their word.
    words = {token: word for word, tokens in added.items() for token in tokens}
    dropped = [
        " ".join(
            word or tokenizer.decode(torch.tensor([*group])).strip()
            for word, group in itertools.groupby(tokens[chunks * CHUNK :], words.get)
        )
        for tokens in encoded
    ]
    return Tokens(ids, lengths, tuple(dropped))


def _encode(prompt: str, added: Mapping[str, range]) -> list[int]:
    """Tokens of a prompt without start and end."""
    encode = _open_clip_tokenizer()._tokenizer.encode
    if not added:
        tokens: list[int] = encode(prompt)
        return tokens
    # At a word character the word must end too: `cat` is no part of `catalogue`.
    patterns = [
        (r"(?<!\w)" if re.match(r"\w", word) else "") + re.escape(word) + (r"(?!\w)" if re.search(r"\w$", word) else "")
        for word in sorted(added, key=len, reverse=True)
    ]
    parts = re.split(f"({'|'.join(patterns)})", prompt)
    return [token for i, part in enumerate(parts) for token in (added[part] if i % 2 else encode(part))]
