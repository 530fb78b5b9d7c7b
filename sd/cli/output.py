"""Pictures in a folder: PNGs numbered on from those that are there, their settings inside, and one grid of them all."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path

import torch

from sd.errors import ConfigError

PADDING = 2  # pixels around each picture of a grid, black


class Album:
    """The output of one command: OUTDIR/samples/NNNNN.png, OUTDIR/grid-NNNN.png. Nothing is overwritten.

    Making one makes the folders and raises ConfigError where nothing can be written.
    """

    def __init__(self, outdir, samples: bool = True, grid: bool = True):
        self.outdir, self.samples = Path(outdir), Path(outdir) / "samples"
        self.saves_samples, self.saves_grid = samples, grid
        self._images: list[torch.Tensor] = []  # for the grid
        folders = [self.samples] * samples + [self.outdir] * grid
        for folder in folders:
            with _writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass

    def add(self, images, texts: list[dict]) -> list[Path]:
        """Save uint8 pictures [B, H, W, 3], each with its texts inside; the names of the files."""
        if self.saves_grid:
            self._images.append(images)
        if not self.saves_samples:
            return []
        return [_save(image, text, self.samples, "", 5) for image, text in zip(images, texts)]

    def add_grid(self, per_row: int, text: dict) -> Path | None:
        """Save all pictures so far in rows of `per_row`; the name of the file, None where grids are not wanted."""
        if not self.saves_grid:
            return None
        return _save(grid(torch.cat(self._images), per_row), text, self.outdir, "grid-", 4)


def grid(images, per_row: int):
    """uint8 [N, H, W, 3] -> [H', W', 3], as torchvision.make_grid lays out: a single picture gets no frame."""
    count, height, width, channels = images.shape
    if count == 1:
        return images[0]
    columns = min(per_row, count)
    rows = -(-count // columns)
    height, width = height + PADDING, width + PADDING
    canvas = images.new_zeros(rows * height + PADDING, columns * width + PADDING, channels)
    for i, image in enumerate(images):
        top, left = i // columns * height + PADDING, i % columns * width + PADDING
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def _save(image, texts: dict, folder: Path, stem: str, digits: int) -> Path:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, str(value))
    unfinished = folder / f".{stem or 'sample-'}{os.getpid()}.png"
    with _writing(folder):
        try:
            Image.fromarray(image.numpy()).save(unfinished, "PNG", pnginfo=info)
            path = _reserve(folder, stem, digits)
            os.replace(unfinished, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                unfinished.unlink()
    return path


def _reserve(folder: Path, stem: str, digits: int) -> Path:
    """The name after the highest one, as an empty file that no other process can then take."""
    pattern = re.compile(rf"{stem}(\d+)\.png")
    taken = [int(match[1]) for match in map(pattern.fullmatch, os.listdir(folder)) if match]
    number = max(taken, default=-1) + 1
    while True:
        path = folder / f"{stem}{number:0{digits}}.png"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            number += 1
        else:
            return path


@contextlib.contextmanager
def _writing(folder: Path):
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--outdir: {folder} cannot be written ({error.strerror or error}): choose another") from None
