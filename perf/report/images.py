"""Images of configurations and their differences from the reference, if stored beside a run.

An image is a PNG named after the configuration's id (text.file_name), in `STEM_pictures/` or `pictures/` beside the saved
run, or in the folder of `--pictures`; `pytest perf --perf-trace DIR` writes them to `DIR/pictures/`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perf.report.results import Result
from perf.report.text import file_name

LARGEST_BYTES = 4_000_000
SIDE = 192  # pixels of an image on the page
AMPLIFIED = 8


@dataclass(frozen=True)
class Image:
    """The image of a configuration and, if it has a reference, the amplified difference; both PNG as data: URIs."""

    result: Result
    image: str
    difference: str | None


@dataclass(frozen=True)
class Images:
    """The images read; missing: why some or all are missing."""

    found: tuple[Image, ...] = ()
    missing: str | None = None


def find(results: Sequence[Result], more: Path | None = None) -> Images:
    """Read the images of results, also from the folder `more`. Unreadable files are listed in `missing`."""
    images, absent, damaged = [], 0, []
    for result in results:
        path = _path(result, result.id, more)
        if path is None:
            absent += 1
            continue
        try:
            image = _read(path)
            reference = _path(result, result.image_reference, more) if result.image_reference else None
            difference = _difference(image, _read(reference)) if reference not in (None, path) else None
        except (OSError, ValueError, SyntaxError, ImportError) as error:
            damaged.append(f"cannot be read: {result.id}: {type(error).__name__}")
            continue
        images.append(Image(result, _uri(image), difference and _uri(difference)))
    reasons = [f"{absent} of {len(results)} configurations have no image beside their saved run"] if absent else []
    reasons += ["`pytest perf --perf-trace DIR` writes images to DIR/pictures"] if absent else []
    return Images(tuple(images), ". ".join(reasons + damaged) or None)


def _path(result: Result, id: str, more: Path | None) -> Path | None:
    run = result.session.saved.path
    folders = (run.with_name(f"{run.stem}_pictures"), run.with_name("pictures"), *([more] if more else []))
    for folder in folders:
        path = folder / f"{file_name(id)}.png"
        if path.is_file() and path.stat().st_size <= LARGEST_BYTES:
            return path
    return None


def _read(path: Path):
    from PIL import Image as pillow

    with pillow.open(path, formats=["PNG"]) as image:
        if max(image.size) > 4096:
            raise ValueError("too large")
        return image.convert("RGB")


def _difference(image, reference):
    from PIL import ImageChops

    if image.size != reference.size:
        return None
    return ImageChops.difference(image, reference).point(lambda value: min(255, AMPLIFIED * value))


def _uri(image) -> str:
    image = image.copy()
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
