"""Training images of the embedded model: one coloured shape on a coloured background, drawn and recognised here.

Shapes are signed distance functions (Inigo Quilez, "2D distance functions"): edges are smooth at any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 64  # pixels
RADIUS = 21.0  # pixels, about that of a shape's circumscribed circle
JITTER = 2.0  # pixels, largest offset from the centre
PALETTE = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (245, 220, 40),
    "purple": (140, 40, 170),
    "orange": (250, 135, 20),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
COLOURS = tuple(PALETTE)


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    dx, dy = x.abs() - half_width, y.abs() - half_height
    return torch.hypot(dx.clamp(min=0), dy.clamp(min=0)) + torch.maximum(dx, dy).clamp(max=0)


def _triangle(x: Tensor, y: Tensor, r: float) -> Tensor:
    y = y - 0.2 * r  # its centre of mass is below the centre of its circle
    return torch.maximum(0.866 * x.abs() - 0.5 * y, y) - 0.55 * r


def _star(x: Tensor, y: Tensor, r: float) -> Tensor:
    """Fold the plane onto one of the ten edges of a five-pointed star; return the distance from the line of that edge."""
    outer, inner = 1.12 * r, 0.46 * r
    sector = math.pi / 5
    angle = torch.atan2(x, -y).abs() % (2 * sector)
    angle = torch.minimum(angle, 2 * sector - angle)
    radius = torch.hypot(x, y)
    px, py = radius * angle.sin(), radius * angle.cos()
    ex, ey = inner * math.sin(sector), inner * math.cos(sector) - outer  # along the edge, from its tip
    return ((py - outer) * ex - px * ey) / math.hypot(ex, ey)


# (x, y, radius) -> signed distance, negative inside.
SHAPE_DISTANCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "circle": lambda x, y, r: torch.hypot(x, y) - 0.95 * r,
    "square": lambda x, y, r: _box(x, y, 0.82 * r, 0.82 * r),
    "triangle": _triangle,
    "cross": lambda x, y, r: torch.minimum(_box(x, y, r, 0.3 * r), _box(x, y, 0.3 * r, r)),
    "ring": lambda x, y, r: (torch.hypot(x, y) - 0.75 * r).abs() - 0.22 * r,
    "star": _star,
}
SHAPES = tuple(SHAPE_DISTANCES)


@dataclass(frozen=True)
class Subject:
    """Attributes of an image."""

    colour: str
    shape: str
    background: str

    def caption(self, template: int = 0) -> str:
        """Format the caption with one of TEMPLATES."""
        return TEMPLATES[template].format(
            colour=_with_article(self.colour), shape=self.shape, background=_with_article(self.background)
        )


TEMPLATES = (
    "{colour} {shape} on {background} background",
    "a photo of {colour} {shape} on {background} background",
    "{colour} {shape}, {background} background",
)


def _with_article(colour: str) -> str:
    return ("an " if colour[0] in "aeiou" else "a ") + colour


SUBJECTS = tuple(
    Subject(colour, shape, background)
    for colour in COLOURS
    for shape in SHAPES
    for background in COLOURS
    if colour != background
)
# Excluded from training, to test whether the model combines attributes.
HELD_OUT = SUBJECTS[5::10]
TRAINED = tuple(subject for subject in SUBJECTS if subject not in set(HELD_OUT))


def _grid(size: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    return axis[None, :], axis[:, None]


def draw(subjects: Sequence[Subject], generator: torch.Generator | None = None, size: int = SIZE) -> Tensor:
    """Draw the subjects with random offsets from the centre: float32 [B, 3, size, size] in [-1, 1]."""
    offsets = (torch.rand(len(subjects), 2, generator=generator) * 2 - 1) * JITTER
    x, y = _grid(size)
    palette = torch.tensor([PALETTE[colour] for colour in COLOURS], dtype=torch.float32) / 127.5 - 1
    images = []
    for subject, (dx, dy) in zip(subjects, offsets.tolist()):
        inside = (0.5 - SHAPE_DISTANCES[subject.shape](x - dx, y - dy, RADIUS * size / SIZE)).clamp(0, 1)
        fore, back = (palette[COLOURS.index(name)][:, None, None] for name in (subject.colour, subject.background))
        images.append(back + inside * (fore - back))
    return torch.stack(images)


def recognise(image: Tensor) -> Subject | None:
    """Recognise the subject of a uint8 image [H, W, 3]; None if it has a single colour.

    Pixels are quantised to the palette. The background is the most frequent colour of the border, the shape's colour the
    most frequent other one, and the shape the template of highest overlap over a few offsets and sizes.
    """
    size = image.shape[0]
    palette = torch.tensor([PALETTE[colour] for colour in COLOURS], dtype=torch.float32)
    nearest = torch.cdist(torch.as_tensor(image).reshape(-1, 3).float(), palette).argmin(dim=1).reshape(image.shape[:2])
    edge = max(1, size // 16)
    frame = torch.ones_like(nearest, dtype=torch.bool)
    frame[edge:-edge, edge:-edge] = False
    background = int(nearest[frame].bincount(minlength=len(COLOURS)).argmax())
    counts = nearest.flatten().bincount(minlength=len(COLOURS))
    counts[background] = 0
    colour = int(counts.argmax())
    if counts[colour] < 0.02 * nearest.numel():
        return None
    mask = nearest != background
    best = max(SHAPES, key=lambda shape: _overlap(mask, shape, size))
    return Subject(COLOURS[colour], best, COLOURS[background])


def _overlap(mask: Tensor, shape: str, size: int) -> float:
    """Return the highest intersection over union of the mask with the shape over a few offsets and sizes."""
    x, y = _grid(size)
    scale = size / SIZE
    best = 0.0
    for radius in (0.85, 1.0, 1.15):
        for dx in (-4, -2, 0, 2, 4):
            for dy in (-4, -2, 0, 2, 4):
                template = SHAPE_DISTANCES[shape](x - dx * scale, y - dy * scale, radius * RADIUS * scale) < 0
                union = (mask | template).sum().item()
                best = max(best, (mask & template).sum().item() / max(union, 1))
    return best
