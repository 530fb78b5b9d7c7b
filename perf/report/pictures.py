"""Pictures of configurations and their difference from the reference, where a run's folder has them.

A picture is a PNG named after its configuration's id (text.file_name), in `STEM_pictures/` or `pictures/` beside the
saved run, or in the folder that `--pictures` names; `pytest perf --perf-trace DIR` writes them to `DIR/pictures/`.
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
SIDE = 192  # pixels of a picture on the page
AMPLIFIED = 8


@dataclass(frozen=True)
class Picture:
    """A configuration's picture and, against its reference, the difference; both PNG as data: URIs."""

    result: Result
    image: str
    difference: str | None


@dataclass(frozen=True)
class Pictures:
    """What was found; missing: why there is nothing, or not all."""

    found: tuple[Picture, ...] = ()
    missing: str | None = None


def find(results: Sequence[Result], more: Path | None = None) -> Pictures:
    """The pictures of results, also from the folder `more`. Never fails: what cannot be read is missing, with its reason."""
    found, absent, damaged = [], 0, []
    for one in results:
        path = _path(one, one.id, more)
        if path is None:
            absent += 1
            continue
        try:
            image = _read(path)
            reference = _path(one, one.image_reference, more) if one.image_reference else None
            difference = None
            if reference is not None and reference != path:
                difference = _difference(image, _read(reference))
        except (OSError, ValueError, SyntaxError, ImportError) as error:
            damaged.append(f"{one.id}: {type(error).__name__}")
            continue
        found.append(Picture(one, _uri(image), difference and _uri(difference)))
    reasons = []
    if absent:
        reasons.append(f"{absent} of {len(results)} configurations have no picture beside their saved run")
        reasons[0] += "; `pytest perf --perf-trace DIR` writes them to DIR/pictures"
    reasons += [f"cannot be read: {name}" for name in damaged]
    return Pictures(tuple(found), ". ".join(reasons) or None)


def _path(one: Result, id: str, more: Path | None) -> Path | None:
    run = one.session.saved.path
    folders = (run.with_name(f"{run.stem}_pictures"), run.with_name("pictures"), *([more] if more else []))
    for folder in folders:
        path = folder / f"{file_name(id)}.png"
        if path.is_file() and path.stat().st_size <= LARGEST_BYTES:
            return path
    return None


def _read(path: Path):
    from PIL import Image  # comes with matplotlib

    with Image.open(path, formats=["PNG"]) as image:
        if max(image.size) > 4096:
            raise ValueError("too large")
        return image.convert("RGB")


def _difference(image, reference):
    from PIL import ImageChops

    if image.size != reference.size:
        return None
    return ImageChops.difference(image, reference).point(lambda value: min(255, AMPLIFIED * value))


def _uri(image) -> str:
    shown = image.copy()
    shown.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    shown.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
