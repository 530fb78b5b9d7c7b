"""Numbered PNG files with their settings as text chunks, and a grid of all images of a run."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor

from sd.errors import ConfigError

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

PADDING = 2  # pixels around each image of a grid, black


class OutputFolder:
    """Output of one command: OUTDIR/samples/NNNNN.png and OUTDIR/grid-NNNN.png. No file is overwritten.

    The constructor makes the folders and raises ConfigError where they cannot be written.
    """

    def __init__(self, outdir: str | Path, samples: bool = True, grid: bool = True):
        self.outdir, self.samples = Path(outdir), Path(outdir) / "samples"
        self.saves_samples, self.saves_grid = samples, grid
        for folder in [self.samples] * samples + [self.outdir] * grid:
            with _writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass

    def add(self, images: Tensor, texts: list[dict[str, object]]) -> list[Path]:
        """Save uint8 images [B, H, W, 3] with the text chunks of each; return the paths."""
        if not self.saves_samples:
            return []
        return [_save(image, text, self.samples) for image, text in zip(images, texts)]

    def grid(self, count: int, per_row: int) -> AbstractContextManager[GridFile | None]:
        """Return the grid of a run of `count` images, None where grids are not saved."""
        return GridFile(self.outdir, count, per_row) if self.saves_grid else contextlib.nullcontext()


class GridFile:
    """A grid of `count` images laid out like torchvision.utils.make_grid; a single image gets no frame.

    It is written row by row, so that memory holds one row at most. A context manager, which discards an incomplete grid.
    """

    def __init__(self, outdir: Path, count: int, per_row: int):
        self.outdir, self.count, self.columns = outdir, count, min(per_row, count)
        self.padding = PADDING if count > 1 else 0
        self.row: list[Tensor] = []
        self.png: _PngStream | None = None
        self.partial = outdir / f".grid-{os.getpid()}.png"

    def __enter__(self) -> GridFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self.png is not None:
            self.png.file.close()
        self.partial.unlink(missing_ok=True)

    def add(self, images: Tensor, text: Mapping[str, object]) -> None:
        """Append uint8 images [B, H, W, 3], all of one size. text: the text chunks, of which those of the first call count."""
        with _writing(self.outdir):
            if self.png is None:
                height, width = (size + self.padding for size in images.shape[1:3])
                rows = -(-self.count // self.columns)
                size = self.columns * width + self.padding, rows * height + self.padding
                self.png = _PngStream(self.partial.open("wb"), *size, text)
            for image in images:
                self.row.append(image)
                if len(self.row) == self.columns:
                    self._write_row(self.png)

    def _write_row(self, png: _PngStream) -> None:
        tiles = [F.pad(image, (0, 0, self.padding, 0, self.padding, 0)) for image in self.row]
        tiles += [torch.zeros_like(tiles[0])] * (self.columns - len(tiles))
        png.write(F.pad(torch.cat(tiles, dim=1), (0, 0, 0, self.padding)))
        self.row = []

    def save(self) -> Path:
        """Complete the grid and return its path."""
        assert self.png is not None, "a run has at least one image"
        with _writing(self.outdir):
            if self.row:
                self._write_row(self.png)
            if self.padding:
                self.png.write(torch.zeros(self.padding, self.png.width, 3, dtype=torch.uint8))
            self.png.close()
            path = _reserve(self.outdir, "grid-", 4)
            os.replace(self.partial, path)
        return path


class _PngStream:
    """An RGB image [height, width] written to a PNG file by rows, which Pillow cannot do; each row is stored as the
    difference from the row above.
    """

    def __init__(self, file: BinaryIO, width: int, height: int, text: Mapping[str, object]):
        self.file, self.width = file, width
        self.compressor = zlib.compressobj()
        self.above = torch.zeros(1, 3 * width, dtype=torch.uint8)
        file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))  # 8 bits, RGB, not interlaced
        for chunk in _png_info(text).chunks:
            self._chunk(*chunk[:2])

    def _chunk(self, name: bytes, data: bytes) -> None:
        from PIL.PngImagePlugin import putchunk

        putchunk(self.file, name, data)

    def write(self, pixels: Tensor) -> None:
        """Append uint8 rows [h, width, 3]."""
        rows = torch.cat([self.above, pixels.flatten(1)])
        self.above = rows[-1:]
        differences = F.pad(rows[1:] - rows[:-1], (1, 0), value=2)  # filter type 2: the row above
        if data := self.compressor.compress(differences.numpy().tobytes()):
            self._chunk(b"IDAT", data)

    def close(self) -> None:
        """Complete and close the file."""
        self._chunk(b"IDAT", self.compressor.flush())
        self._chunk(b"IEND", b"")
        self.file.close()


def _png_info(texts: Mapping[str, object]) -> PngInfo:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, str(value))
    return info


def _save(image: Tensor, texts: Mapping[str, object], folder: Path) -> Path:
    from PIL import Image

    partial = folder / f".sample-{os.getpid()}.png"
    with _writing(folder):
        try:
            Image.fromarray(image.numpy()).save(partial, "PNG", pnginfo=_png_info(texts))
            path = _reserve(folder, "", 5)
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
