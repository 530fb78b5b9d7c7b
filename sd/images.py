"""Initial images: their sizes, and their conversion from PIL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sd.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE_MULTIPLE = 64  # pixels; heights and widths are multiples of it, as in the original scripts
MAX_PIXELS = 64 * 2**20  # of an input image: a small file can decode to more than fits in memory


def require_size(name: str, pixels: int) -> None:
    """Raise ConfigError unless `pixels` is a positive multiple of 64."""
    if pixels <= 0 or pixels % SIZE_MULTIPLE:
        nearest = max(round(pixels / SIZE_MULTIPLE), 1) * SIZE_MULTIPLE
        raise ConfigError(f"{name} {pixels}: must be a positive multiple of {SIZE_MULTIPLE}, such as {nearest}")


def image_tensor(image: Image) -> Tensor:
    """Convert a PIL image to float32 [3, H, W] in [-1, 1] on the CPU.

    Applies the EXIF orientation, composites transparent pixels on white, and reduces each side to a multiple of 64 by
    Lanczos resampling, as the original scripts do. Raises ConfigError for images of fewer than 64 pixels a side, more
    than 2**26 pixels, or more than 8 bits a channel.
    """
    import PIL.Image
    from PIL import ImageOps

    if min(image.size) < SIZE_MULTIPLE:
        raise ConfigError(f"image has fewer than {SIZE_MULTIPLE} pixels a side; enlarge it first")
    if image.size[0] * image.size[1] > MAX_PIXELS:
        raise ConfigError(f"image has more than {MAX_PIXELS} pixels; make it smaller first")
    if image.mode[0] in "IF":  # convert() clips their values at 255
        raise ConfigError(f"image has more than 8 bits a channel ({image.mode}); save it with 8")
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    width, height = (size // SIZE_MULTIPLE * SIZE_MULTIPLE for size in image.size)
    image = image.convert("RGB").resize((width, height), PIL.Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 * 2 - 1
