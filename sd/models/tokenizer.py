"""Prompts to tokens, by the tokenizer of open_clip_torch (its vocabulary ships inside that package)."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

END = 49407  # <|endoftext|>
CONTEXT_LENGTH = 77


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


def tokenize(prompts: list[str], encoder: str = "openclip", added: Mapping[str, range] = {}) -> Tensor:
    """prompts -> [B, 77] int64: start, at most 75 tokens, end, padding.

    encoder: `openclip` (SD2) pads with 0, `clip` (SD1) with the end token. A longer prompt is truncated, and its last token
    becomes the end token, as in both originals.
    added: words of textual-inversion embeddings (case-sensitive, not inside longer words) and their token ids.
    """
    tokens: Tensor = _open_clip_tokenizer().tokenize(list(prompts))
    # At a word character the word must end too: `cat` is no part of `catalogue`.
    patterns = [
        (r"(?<!\w)" if re.match(r"\w", word) else "") + re.escape(word) + (r"(?!\w)" if re.search(r"\w$", word) else "")
        for word in sorted(added, key=len, reverse=True)
    ]
    if patterns:
        split = re.compile(f"({'|'.join(patterns)})")
        tokens = torch.stack([_with_added(split.split(prompt), added, row) for prompt, row in zip(prompts, tokens)])
    if encoder == "clip":
        after_end = (tokens == END).cumsum(dim=1) > 0
        tokens = tokens.masked_fill(after_end, END)
    return tokens


def _with_added(parts: list[str], added: Mapping[str, range], row: Tensor) -> Tensor:
    """Tokens [77] of a prompt split at words of `added`; row: its tokens without them, returned if it has none."""
    if len(parts) == 1:
        return row
    encode = _open_clip_tokenizer()._tokenizer.encode
    ids = [token for i, part in enumerate(parts) for token in (added[part] if i % 2 else encode(part))]
    ids = [int(row[0]), *ids[: CONTEXT_LENGTH - 2], END]
    return torch.tensor(ids + [0] * (CONTEXT_LENGTH - len(ids)))
