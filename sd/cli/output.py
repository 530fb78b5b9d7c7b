"""Numbered PNG files with their settings as text chunks, and a grid of all images of a run."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sd.errors import ConfigError

PADDING = 2  # pixels around each image of a grid, black


class OutputFolder:
    """Output of one command: OUTDIR/samples/NNNNN.png and OUTDIR/grid-NNNN.png. No file is overwritten.

    The constructor makes the folders and raises ConfigError where they cannot be written.
    """

    def __init__(self, outdir: str | Path, samples: bool = True, grid: bool = True):
        self.outdir, self.samples = Path(outdir), Path(outdir) / "samples"
        self.saves_samples, self.saves_grid = samples, grid
        self._images: list[Tensor] = []  # for the grid
        for folder in [self.samples] * samples + [self.outdir] * grid:
            with _writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass

    def add(self, images: Tensor, texts: list[dict[str, object]]) -> list[Path]:
        """Save uint8 images [B, H, W, 3] with the text chunks of each; return the paths."""
        if self.saves_grid:
            self._images.append(images)
        if not self.saves_samples:
            return []
        return [_save(image, text, self.samples, "", 5) for image, text in zip(images, texts)]

    def add_grid(self, per_row: int, text: Mapping[str, object]) -> Path | None:
        """Save all added images in rows of `per_row`; return the path, None where grids are not saved."""
        if not self.saves_grid:
            return None
        return _save(grid(torch.cat(self._images), per_row), text, self.outdir, "grid-", 4)


def grid(images: Tensor, per_row: int) -> Tensor:
    """Lay out uint8 [N, H, W, 3] as [H', W', 3] like torchvision.utils.make_grid; a single image gets no frame."""
    count = len(images)
    if count == 1:
        return images[0]
    columns = min(per_row, count)
    rows = -(-count // columns)
    tiles = F.pad(images, (0, 0, PADDING, 0, PADDING, 0, 0, rows * columns - count))
    _, height, width, channels = tiles.shape
    tiles = tiles.reshape(rows, columns, height, width, channels).transpose(1, 2)
    return F.pad(tiles.reshape(rows * height, columns * width, channels), (0, 0, 0, PADDING, 0, PADDING))


def _save(image: Tensor, texts: Mapping[str, object], folder: Path, stem: str, digits: int) -> Path:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, str(value))
    partial = folder / f".{stem or 'sample-'}{os.getpid()}.png"
    with _writing(folder):
        try:
            Image.fromarray(image.numpy()).save(partial, "PNG", pnginfo=info)
            path = _reserve(folder, stem, digits)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def _reserve(folder: Path, stem: str, digits: int) -> Path:
    """Create an empty file with the number after the highest, so that no other process takes that name."""
    pattern = re.compile(rf"{stem}(\d+)\.png")
    numbers = [int(match[1]) for match in map(pattern.fullmatch, os.listdir(folder)) if match]
    number = max(numbers, default=-1) + 1
    while True:
        path = folder / f"{stem}{number:0{digits}}.png"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return path


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--outdir: {folder} cannot be written ({error.strerror or error}): choose another") from None
