"""Initial images: their sizes, and their conversion from PIL."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sd.errors import ConfigError, SDWarning

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE_MULTIPLE = 64  # pixels; heights and widths are multiples of it, as in the original scripts
MAX_PIXELS = 64 * 2**20  # of an input image: a small file can decode to more than fits in memory

MAX_ABSOLUTE = 2.0  # of pixels in [-1, 1]: a decoded image may exceed 1 a little
EXIF_ORIENTATION = 0x0112


def require_size(name: str, pixels: int) -> None:
    """Raise ConfigError unless `pixels` is a positive multiple of 64."""
    if pixels <= 0 or pixels % SIZE_MULTIPLE:
        nearest = max(round(pixels / SIZE_MULTIPLE), 1) * SIZE_MULTIPLE
        raise ConfigError(f"{name} {pixels}: must be a positive multiple of {SIZE_MULTIPLE}, such as {nearest}")


def require_pixels(image: Tensor) -> None:
    """Raise ConfigError unless the image is float [3, H, W] with values in [-1, 1], of which a decoder's excess is allowed."""
    if image.dim() != 3 or len(image) != 3 or not image.is_floating_point():
        raise ConfigError(f"image {tuple(image.shape)} {image.dtype}: must be float [3, H, W] in [-1, 1]")
    largest = image.abs().max().item()
    if not largest <= MAX_ABSOLUTE:  # true for NaN too
        remedy = "convert 0..255 by image / 127.5 - 1" if largest <= 256 else "its values are not pixels"
        raise ConfigError(f"image has values up to {largest:g}: must be in [-1, 1]; {remedy}")


def image_tensor(image: Image) -> Tensor:
    """Convert a PIL image to float32 [3, H, W] in [-1, 1] on the CPU.

    Applies the EXIF orientation, composites transparent pixels on white, and reduces each side to a multiple of 64 by
    Lanczos resampling, as the original scripts do. Warns (SDWarning) of the first two. Raises ConfigError for images of
    fewer than 64 pixels a side, more than 2**26 pixels, or more than 8 bits a channel.
    """
    import PIL.Image
    from PIL import ImageOps

    if min(image.size) < SIZE_MULTIPLE:
        raise ConfigError(f"image has fewer than {SIZE_MULTIPLE} pixels a side; enlarge it first")
    if image.size[0] * image.size[1] > MAX_PIXELS:
        raise ConfigError(f"image has more than {MAX_PIXELS} pixels; make it smaller first")
    if image.mode[0] in "IF":  # convert() clips their values at 255
        raise ConfigError(f"image has more than 8 bits a channel ({image.mode}); save it with 8")
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    if orientation in range(2, 9):
        warnings.warn(f"initial image: its EXIF orientation, {orientation}, is applied", SDWarning, stacklevel=2)
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] != 255:
            warnings.warn("initial image: its transparent pixels are composited on white", SDWarning, stacklevel=2)
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    width, height = (size // SIZE_MULTIPLE * SIZE_MULTIPLE for size in image.size)
    image = image.convert("RGB").resize((width, height), PIL.Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 * 2 - 1
