"""Images with captions of a folder, for sd.train."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sd.cli.input_images import open_image
from sd.errors import ConfigError
from sd.images import square_tensor

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Examples:
    """Images and their captions."""

    paths: list[Path]
    captions: list[str]

    def image(self, i: int, size: int) -> Tensor:
        """float32 [3, size, size] in [-1, 1]. Raises ConfigError naming the file."""
        return open_image(self.paths[i], "--data", lambda image: square_tensor(image, size))


def read_examples(folder: Path) -> Examples:
    """The images of a folder by name, with captions from NAME.txt or metadata.jsonl. Raises ConfigError naming the file."""
    if not folder.is_dir():
        raise ConfigError(f"--data {folder}: no such folder")
    listed = _read_metadata(folder / "metadata.jsonl")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)
    if not paths:
        raise ConfigError(f"--data {folder}: has no image ({', '.join(IMAGES)})")
    captions = []
    for path in paths:
        text = path.with_suffix(".txt")
        if path.name in listed:
            captions.append(listed[path.name])
        elif text.is_file():
            captions.append(text.read_text(encoding="utf-8", errors="replace").strip())
        else:
            raise ConfigError(
                f"--data: {path} has no caption: write {text.name} beside it, or a line of metadata.jsonl"
            )
    absent = sorted(listed.keys() - {path.name for path in paths})
    if absent:
        raise ConfigError(f"--data: metadata.jsonl names {absent[0]}, which is no image of {folder}")
    return Examples(paths, captions)


def _read_metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    captions = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if line.strip():
            try:
                entry = json.loads(line)
                captions[str(entry["file_name"])] = str(entry["text"])
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f'--data: {path}, line {number}: must be like {{"file_name": "a.png", "text": "..."}}'
                ) from None
    return captions
