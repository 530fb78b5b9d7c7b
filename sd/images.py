"""Images, masks and depth maps: their sizes, and their conversion from PIL and to uint8."""

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
    image = image if isinstance(image, Tensor) else _opaque(image, "white", INITIAL_IMAGE)
    if not isinstance(mask, Tensor):
        mask = _opaque(mask, "black", "mask")
        return _pixels_of_size(image, mask, "mask"), mask_tensor(mask)
    mask = _plane(mask, "mask", "float or bool", mask.is_floating_point() or mask.dtype == torch.bool)
    image = _pixels_of_size(image, mask, "mask")
    if not ((mask >= 0) & (mask <= 1)).all():
        raise ConfigError("mask: must have values from 0 to 1, which is repainted")
    return image, (mask >= 0.5).float()


def image_with_depth(image: Tensor | Image, depth: Tensor | Image) -> tuple[Tensor, Tensor]:
    """Convert to a float image [3, H, W] in [-1, 1] and a float32 depth map of any scale, larger where nearer.

    image: as a result of `image_tensor`, or PIL. depth: float or integer, [H, W] or [1, H, W], or PIL in grey, of any
    number of bits. The map returned has the size of the image before any resizing. Raises ConfigError unless the depth
    given has it, and for a depth image in colour.
    """
    image = image if isinstance(image, Tensor) else _opaque(image, "white", INITIAL_IMAGE)
    values = depth if isinstance(depth, Tensor) else torch.from_numpy(np.array(_grey(depth), dtype=np.float32))
    values = _plane(values, "depth", "float or integer", values.dtype != torch.bool and not values.is_complex())
    return _pixels_of_size(image, values, "depth image"), values


def latent_depth(depth: Tensor, height: int, width: int) -> Tensor:
    """depth [H, W] -> [1, 1, height, width] of latent cells: bicubic, then scaled to [-1, 1], as in the original script.

    Raises ConfigError for a map that is not finite, or of one value, for which the original divides by 0.
    """
    if not torch.isfinite(depth).all():
        raise ConfigError("depth: has values that are not finite; give a number for each pixel")
    cells = F.interpolate(depth[None, None], size=(height, width), mode="bicubic", align_corners=False)
    low, high = cells.amin(), cells.amax()
    if high - low <= 1e-6 * depth.abs().amax():  # differences that are due to rounding
        raise ConfigError("depth: has one value everywhere; give a map that is brighter where the scene is nearer")
    return 2.0 * (cells - low) / (high - low) - 1.0


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


def _pixels_of_size(image: Tensor | Image, other: Tensor | Image, name: str) -> Tensor:
    """The image as [3, H, W] in [-1, 1]. Raises ConfigError unless `other`, before any resizing, has its size."""
    if isinstance(image, Tensor):
        require_pixels(image)
    own, size = (
        f"{x.shape[-1]}x{x.shape[-2]}" if isinstance(x, Tensor) else "{}x{}".format(*x.size) for x in (image, other)
    )
    if own != size:
        raise ConfigError(f"{name} has {size} pixels and the image {own}: give a {name} of the image's size")
    return image if isinstance(image, Tensor) else image_tensor(image)


def _plane(values: Tensor, name: str, types: str, valid_type: bool) -> Tensor:
    """float32 [H, W] from [H, W] or [1, H, W]. Raises ConfigError for other shapes, and unless valid_type."""
    shape = tuple(values.shape)
    if values.dim() not in (2, 3) or values[..., 0, 0].numel() != 1 or not valid_type:
        raise ConfigError(f"{name} {shape} {values.dtype}: must be {types}, [H, W] or [1, H, W]")
    return values.reshape(shape[-2:]).float()


def _grey(depth: Image) -> Image:
    """A depth image as displayed, in one channel of any depth. Raises ConfigError for one in colour."""
    if depth.mode[0] in "IF":
        return _upright(depth, "depth image")
    depth = _opaque(depth, "black", "depth image")
    if depth.mode not in ("1", "L"):
        channels = np.array(depth.convert("RGB"))
        if (channels != channels[..., :1]).any():
            raise ConfigError("depth image is in colour: give a grey one, brighter where nearer")
    return depth.convert("L")


def _upright(image: Image, name: str) -> Image:
    """The image with its orientation, with a warning of one. Raises ConfigError for too few or too many pixels."""
    from PIL import ImageOps

    if min(image.size) < SIZE_MULTIPLE:
        raise ConfigError(f"image has fewer than {SIZE_MULTIPLE} pixels a side; enlarge it first")
    if image.size[0] * image.size[1] > MAX_PIXELS:
        raise ConfigError(f"image has more than {MAX_PIXELS} pixels; make it smaller first")
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    if orientation in range(2, 9):
        warnings.warn(f"{name}: its EXIF orientation, {orientation}, is applied", SDWarning, stacklevel=4)
    return ImageOps.exif_transpose(image)


def _opaque(image: Image, background: str, name: str) -> Image:
    """The image as displayed: with its orientation, and its transparent pixels over a background, with a warning of each.

    name: in the warnings, whose place is the caller's caller. Raises ConfigError.
    """
    import PIL.Image

    if image.mode[0] in "IF":  # convert() clips their values at 255
        raise ConfigError(f"image has more than 8 bits a channel ({image.mode}); save it with 8")
    image = _upright(image, name)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] != 255:
            warnings.warn(f"{name}: its transparent pixels are composited on {background}", SDWarning, stacklevel=3)
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, background), image)
    return image
