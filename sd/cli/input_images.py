"""Image files of the command lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sd.errors import ConfigError
from sd.images import image_tensor

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

T = TypeVar("T")


def read_image(path: str | Path) -> Tensor:
    """Read the file of --init-img as float32 [3, H, W] in [-1, 1] (see sd.images.image_tensor). Raises ConfigError naming it."""
    return open_image(path, "--init-img", image_tensor)


def open_pair(
    image_path: str, option: str, path: str, convert: Callable[[Image, Image], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Convert the files of --init-img and of another option together. Raises ConfigError naming option and file."""

    def with_image(image: Image) -> tuple[Tensor, Tensor]:
        return open_image(path, option, lambda other: convert(image, other))

    return open_image(image_path, "--init-img", with_image)


def open_image(path: str | Path, option: str, convert: Callable[[Image], T]) -> T:
    """Convert an opened image file. Raises ConfigError naming the option and the file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return convert(image)
    except ConfigError as error:
        raise ConfigError(f"{option} {path}: {error}") from None
    # Pillow's decoders raise all of these for damaged files.
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{option} {path}: cannot be read as an image ({reason})") from None
