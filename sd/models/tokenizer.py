"""Prompts to tokens, by the tokenizer of open_clip_torch (its vocabulary ships inside that package)."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

END = 49407


@functools.cache
def _open_clip_tokenizer():
    """open_clip's module `tokenizer`, which stands alone, without the package around it.

    `import open_clip` brings torchvision, timm and torch._dynamo with it: more seconds than loading SD's own weights,
    in every process that draws a picture.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("the package open_clip_torch is not installed: pip install open_clip_torch")
    spec = importlib.util.spec_from_file_location(
        "_open_clip_tokenizer", Path(package.submodule_search_locations[0]) / "tokenizer.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tokenize(prompts: list[str], kind: str = "openclip"):
    """prompts -> [B, 77] int64: start, at most 75 tokens, end, padding.

    kind `openclip` (SD2) pads with 0; `clip` (SD1) pads with the end token. A longer prompt is cut, its last token
    becoming the end token, as both originals do.
    """
    tokens = _open_clip_tokenizer().tokenize(list(prompts))
    if kind == "clip":
        after_end = (tokens == END).cumsum(dim=1) > 0
        tokens = tokens.masked_fill(after_end, END)
    return tokens
