"""Prompts to tokens, by the tokenizer of open_clip_torch (its vocabulary ships inside that package)."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

from torch import Tensor

END = 49407  # <|endoftext|>


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


def tokenize(prompts: list[str], encoder: str = "openclip") -> Tensor:
    """prompts -> [B, 77] int64: start, at most 75 tokens, end, padding.

    encoder: `openclip` (SD2) pads with 0, `clip` (SD1) with the end token. A longer prompt is truncated, and its last token
    becomes the end token, as in both originals.
    """
    tokens: Tensor = _open_clip_tokenizer().tokenize(list(prompts))
    if encoder == "clip":
        after_end = (tokens == END).cumsum(dim=1) > 0
        tokens = tokens.masked_fill(after_end, END)
    return tokens
