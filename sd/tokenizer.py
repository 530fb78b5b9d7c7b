"""Prompts to tokens, by the tokenizer of open_clip_torch (its vocabulary ships inside that package)."""

from __future__ import annotations

START, END = 49406, 49407


def tokenize(prompts: list[str], kind: str = "openclip"):
    """prompts -> [B, 77] int64: start, at most 75 tokens, end, padding.

    kind `openclip` (SD2) pads with 0; `clip` (SD1) pads with the end token. A longer prompt is cut, its last token
    becoming the end token, as both originals do.
    """
    from open_clip.tokenizer import tokenize as open_clip_tokenize  # slow to import, and not needed to load a model

    tokens = open_clip_tokenize(list(prompts))
    if kind == "clip":
        after_end = (tokens == END).cumsum(dim=1) > 0
        tokens = tokens.masked_fill(after_end, END)
    return tokens
