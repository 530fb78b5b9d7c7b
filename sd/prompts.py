"""Prompts of a call: one for each image, and what of them is encoded."""

from __future__ import annotations

import warnings
from typing import Literal

from sd.errors import ConfigError, SDWarning, printable
from sd.models.tokenizer import CHUNK, Tokens

PromptChunks = int | Literal["auto"]
MAX_QUOTED = 300  # characters of dropped text in a warning


def prompts_of_images(
    prompt: str | list[str], negative: str | list[str] | None, batch: int
) -> tuple[list[str], list[str]]:
    """Return the prompt and the negative prompt of each image: `batch` images of each prompt. Raises ConfigError."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or batch < 1:
        raise ConfigError("at least one prompt and a batch of at least 1")
    negatives = [negative or ""] * len(prompts) if negative is None or isinstance(negative, str) else list(negative)
    if len(negatives) != len(prompts):
        raise ConfigError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; pass one, or one for each")
    return [p for p in prompts for _ in range(batch)], [n for n in negatives for _ in range(batch)]


def number_of_chunks(prompt_chunks: PromptChunks) -> int | None:
    """Return the number of chunks, None for as many as the longest prompt needs. Raises ConfigError."""
    if prompt_chunks == "auto":
        return None
    if not isinstance(prompt_chunks, int) or prompt_chunks < 1:
        raise ConfigError(f"prompt_chunks {prompt_chunks}: must be at least 1, or auto")
    return prompt_chunks


def warn_of_dropped(prompts: list[str], negatives: list[str], tokens: Tokens) -> None:
    """Warn of the text after the last chunk, once for equal prompts. tokens: of the prompts and the negative prompts."""
    labels = ["prompt"] * len(prompts) + ["negative prompt"] * len(negatives)
    limit = CHUNK * tokens.ids.shape[1]
    for label, length, dropped in dict.fromkeys(zip(labels, tokens.lengths, tokens.dropped)):
        if dropped:
            shown = dropped if len(dropped) <= MAX_QUOTED else dropped[:MAX_QUOTED] + " ..."
            warnings.warn(
                f"{label} of {length} tokens: the last {length - limit} are not used: {printable(shown)!r}; "
                "prompt_chunks auto uses all (--prompt-chunks auto)",
                SDWarning,
                stacklevel=3,
            )


def warn_of_unused_negative(negatives: list[str]) -> None:
    """Warn of a negative prompt in a call without guidance."""
    if any(negatives):
        warnings.warn(
            f"negative prompt {next(filter(None, negatives))!r}: not used, since guidance is off at scale 1",
            SDWarning,
            stacklevel=3,
        )
