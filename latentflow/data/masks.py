"""Random masks for training: 1 = repaint, 0 = keep.

A shape is a function (size, rng) -> (H, W) bool array, True = repaint. A new one is a function and a line in
``MASK_SHAPES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from latentflow.errors import UserError, unknown

Size: TypeAlias = tuple[int, int]
MaskShape: TypeAlias = Callable[[Size, np.random.Generator], np.ndarray]

#: Shares of the shapes in training. "full" is what plain generation trains on: nothing is known.
DEFAULT_SHAPES: Mapping[str, float] = {
    "rectangle": 0.2, "strokes": 0.2, "ellipse": 0.1, "half-plane": 0.1, "frame": 0.1, "full": 0.3,
}  # fmt: skip


def random_masks(
    shapes: Mapping[str, float], size: Size, generators: Sequence[np.random.Generator]
) -> Tensor:
    """One mask for each generator.

    Args:
        shapes: key of ``MASK_SHAPES`` -> its share; shares need not add up to 1.
        size: (height, width) in pixels.
        generators: each decides the shape and the form of its mask alone.

    Returns:
        (B, 1, H, W) float32 in {0, 1}.
    """
    names, shares = list(shapes), np.array(list(shapes.values()), dtype=float)
    drawn = [
        MASK_SHAPES[names[rng.choice(len(names), p=shares / shares.sum())]](size, rng) for rng in generators
    ]
    return torch.from_numpy(np.stack(drawn)[:, None].astype(np.float32))


def check_shapes(shapes: Mapping[str, float], more: Sequence[str] = ()) -> None:
    """Refuse shares that cannot be drawn from; ``more`` are names that mean something to the caller.

    Raises:
        UserError: an unknown shape (the nearest is named), a negative share, or none above 0.
    """
    for name, share in shapes.items():
        if name not in MASK_SHAPES and name not in more:
            raise unknown("mask shape", name, [*MASK_SHAPES, *more])
        if not (math.isfinite(share) and share >= 0):
            raise UserError(f"the share of mask shape '{name}' is {share}", "Shares are 0 or more.")
    if not sum(shapes.values()) > 0:
        raise UserError("no mask shape has a share above 0", "Give one, such as: rectangle 0.5 full 0.5")


def rectangle(size: Size, rng: np.random.Generator) -> np.ndarray:
    """A box of 4 to 70 % of the area, at most twice as long as wide, anywhere inside."""
    height, width = size
    area, aspect = rng.uniform(0.04, 0.7), 2.0 ** rng.uniform(-1, 1)
    rows = min(height, max(1, round(height * math.sqrt(area * aspect))))
    columns = min(width, max(1, round(width * math.sqrt(area / aspect))))
    top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
    mask = np.zeros(size, dtype=bool)
    mask[top : top + rows, left : left + columns] = True
    return mask


def strokes(size: Size, rng: np.random.Generator) -> np.ndarray:
    """One to four brush strokes: broken lines with round ends, 3 to 15 % of the shorter side wide."""
    height, width = size
    side = min(size)
    canvas = Image.new("1", (width, height))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(1, 5)):
        brush = max(1, round(side * rng.uniform(0.03, 0.15)))
        point, angle = rng.uniform(0, 1, 2) * (width, height), rng.uniform(0, 2 * math.pi)
        points = [point]
        for _ in range(rng.integers(2, 9)):
            angle += rng.normal(0, 0.8)
            step = side * rng.uniform(0.08, 0.3)
            point = np.clip(point + step * np.array([math.cos(angle), math.sin(angle)]), 0, (width, height))
            points.append(point)
        draw.line([(x, y) for x, y in points], fill=1, width=brush, joint="curve")
        for x, y in points:
            draw.ellipse((x - brush / 2, y - brush / 2, x + brush / 2, y + brush / 2), fill=1)
    return np.asarray(canvas)


def ellipse(size: Size, rng: np.random.Generator) -> np.ndarray:
    """A turned ellipse with half axes of 10 to 50 % of the sides, its centre inside."""
    y, x = _grid(size)
    angle = rng.uniform(0, math.pi)
    dy, dx = y - rng.uniform(), x - rng.uniform()
    along, across = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
    a, b = rng.uniform(0.1, 0.5, 2)
    inside: np.ndarray = (along / a) ** 2 + (across / b) ** 2 <= 1
    return inside


def half_plane(size: Size, rng: np.random.Generator) -> np.ndarray:
    """All that lies to one side of a line: 20 to 80 % of the way across; half of the lines run along the sides."""
    y, x = _grid(size)
    quarter = rng.integers(4) * math.pi / 2
    angle = quarter if rng.uniform() < 0.5 else rng.uniform(0, 2 * math.pi)
    distance = (x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle)
    side: np.ndarray = distance >= np.quantile(distance, rng.uniform(0.2, 0.8))
    return side


def frame(size: Size, rng: np.random.Generator) -> np.ndarray:
    """All but a box: outpainting."""
    return ~rectangle(size, rng)


def full(size: Size, rng: np.random.Generator) -> np.ndarray:
    """Everything: plain generation."""
    return np.ones(size, dtype=bool)


def none(size: Size, rng: np.random.Generator) -> np.ndarray:
    """Nothing: the picture is given whole."""
    return np.zeros(size, dtype=bool)


def _grid(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each pixel's centre, in [0, 1]."""
    height, width = size
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    return y, x


#: shape -> function
MASK_SHAPES: dict[str, MaskShape] = {
    "rectangle": rectangle,
    "strokes": strokes,
    "ellipse": ellipse,
    "half-plane": half_plane,
    "frame": frame,
    "full": full,
    "none": none,
}
