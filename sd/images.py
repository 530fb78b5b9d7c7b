"""Images and masks: their sizes, and their conversion from PIL and to uint8."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sd.errors import ConfigError, SDWarning

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE_MULTIPLE = 64  # pixels; heights and widths are multiples of it, as in the original scripts
MAX_PIXELS = 64 * 2**20  # of an input image: a small file can decode to more than fits in memory

MAX_ABSOLUTE = 2.0  # of pixels in [-1, 1]: a decoded image may exceed 1 a little
EXIF_ORIENTATION = 0x0112
INITIAL_IMAGE = "initial image"  # in warnings


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

    image = _opaque(image, "white", INITIAL_IMAGE)
    image = image.convert("RGB").resize(_multiples(image.size), PIL.Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 * 2 - 1


def square_tensor(image: Image, size: int) -> Tensor:
    """Convert a PIL image to float32 [3, size, size] in [-1, 1] on the CPU: its middle, resized by Lanczos resampling.

    For training. Orientation, transparency and errors are those of `image_tensor`.
    """
    import PIL.Image
    import PIL.ImageOps

    image = _opaque(image, "white", "training image").convert("RGB")
    image = PIL.ImageOps.fit(image, (size, size), PIL.Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 * 2 - 1


def mask_tensor(mask: Image) -> Tensor:
    """Convert a PIL image to a float32 mask [H, W] of 0 and 1 on the CPU: 1, where it is white, is repainted.

    Applies the EXIF orientation, composites transparent pixels on black, reduces each side to a multiple of 64 by
    nearest-neighbour resampling, and rounds at half brightness, as the original scripts do. Raises the errors of
    `image_tensor`.
    """
    import PIL.Image

    mask = _opaque(mask, "black", "mask")
    mask = mask.convert("L").resize(_multiples(mask.size), PIL.Image.Resampling.NEAREST)
    return (torch.from_numpy(np.array(mask)).float() / 255 >= 0.5).float()


def image_with_mask(image: Tensor | Image, mask: Tensor | Image) -> tuple[Tensor, Tensor]:
    """Convert to a float image [3, H, W] in [-1, 1] and a float32 mask [H, W] of 0 and 1.

    image: as a result of `image_tensor`, or PIL. mask: float in [0, 1] or bool, [H, W] or [1, H, W], or PIL.
    Raises ConfigError unless both have the same size, before any resizing.
    """
    if isinstance(image, Tensor):
        require_pixels(image)
    else:
        image = _opaque(image, "white", INITIAL_IMAGE)
    mask = mask if isinstance(mask, Tensor) else _opaque(mask, "black", "mask")
    sizes = [
        f"{x.shape[-1]}x{x.shape[-2]}" if isinstance(x, Tensor) else "{}x{}".format(*x.size) for x in (image, mask)
    ]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"mask has {sizes[1]} pixels and the image {sizes[0]}: give a mask of the image's size")
    if not isinstance(mask, Tensor):
        return image if isinstance(image, Tensor) else image_tensor(image), mask_tensor(mask)
    shape = tuple(mask.shape)
    if (
        mask.dim() not in (2, 3)
        or mask[..., 0, 0].numel() != 1
        or not (mask.is_floating_point() or mask.dtype == torch.bool)
    ):
        raise ConfigError(f"mask {shape} {mask.dtype}: must be float or bool, [H, W] or [1, H, W]")
    mask = mask.reshape(shape[-2:]).float()
    if not ((mask >= 0) & (mask <= 1)).all():
        raise ConfigError("mask: must have values from 0 to 1, which is repainted")
    return image if isinstance(image, Tensor) else image_tensor(image), (mask >= 0.5).float()


def latent_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """mask [H, W] -> [1, 1, height, width] of latent cells: cell (i, j) has the value of pixel (i H/height, j W/width).

    Raises ConfigError for a mask all of whose pixels lie between those.
    """
    cells = F.interpolate(mask[None, None], size=(height, width))
    if mask.any() and not cells.any():
        raise ConfigError("mask: is thinner than a latent cell and would repaint nothing; make its strokes wider")
    return cells


def uint8_images(pixels: Tensor) -> tuple[Tensor, dict[int, str]]:
    """Convert decoded pixels [B, 3, H, W] to uint8 [B, H, W, 3] on the CPU; also return the fault of each unusable image."""
    finite = torch.isfinite(pixels).flatten(1).all(dim=1)
    # Truncated as in the original scripts, where other implementations round.
    images = ((pixels + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
    finite = finite.cpu()
    faults = {}
    for i, image in enumerate(images):
        if not finite[i]:
            faults[i] = "not a number"
        elif not image.any():
            faults[i] = "all black"
    return images, faults


def _multiples(size: tuple[int, int]) -> tuple[int, int]:
    width, height = (side // SIZE_MULTIPLE * SIZE_MULTIPLE for side in size)
    return width, height


def _opaque(image: Image, background: str, name: str) -> Image:
    """The image as displayed: with its orientation, and its transparent pixels over a background, with a warning of each.

    name: in the warnings, whose place is the caller's caller. Raises ConfigError.
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
        warnings.warn(f"{name}: its EXIF orientation, {orientation}, is applied", SDWarning, stacklevel=3)
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] != 255:
            warnings.warn(f"{name}: its transparent pixels are composited on {background}", SDWarning, stacklevel=3)
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, background), image)
    return image
