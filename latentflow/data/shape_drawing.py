"""The geometry of the set `shapes`: four shapes, six colours, antialiased. Lengths are shares of the side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (245, 205, 30),
    "purple": (170, 50, 180),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
_ARM = 0.36  # half the width of the arms of a cross

# Area of each shape in units of half^2; how far its centre of mass lies below its centre in units of half.
AREA = {"circle": np.pi, "square": 4.0, "triangle": 2.0, "cross": 4 * (2 * _ARM - _ARM**2)}
SINK = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3, "cross": 0.0}


@dataclass(frozen=True)
class Placed:
    """An object in a picture: half its width and its centre, as shares of the side."""

    colour: str
    shape: str
    half: float
    x: float
    y: float


def draw(items: list[Placed], resolution: int) -> tuple[Image.Image, list[Mask]]:
    """The objects on white (RGB, antialiased), the later ones on top, and the mask of each, (H, W)."""
    canvas = np.full((resolution, resolution, 3), 255.0)
    masks = []
    for item in items:
        cover = coverage(item.shape, item.half, item.x, item.y, resolution)
        canvas += cover[:, :, None] * (np.array(COLOURS[item.colour]) - canvas)
        masks.append(cover >= 0.5)
    return Image.fromarray(np.rint(canvas).astype(np.uint8)), masks


def coverage(shape: str, half: float, x: float, y: float, resolution: int, samples: int = 4) -> Array:
    """Share of every pixel that the shape covers, (H, W), from ``samples``^2 points in each."""
    cover = np.zeros((resolution, resolution))
    left, top = (max(0, int(np.floor((c - half) * resolution))) for c in (x, y))
    right, bottom = (min(resolution, int(np.ceil((c + half) * resolution))) for c in (x, y))
    if left >= right or top >= bottom:
        return cover
    columns = (left + (np.arange((right - left) * samples) + 0.5) / samples) / resolution
    rows = (top + (np.arange((bottom - top) * samples) + 0.5) / samples) / resolution
    inside = _inside(shape, (columns[None, :] - x) / half, (rows[:, None] - y) / half)
    blocks = inside.reshape(bottom - top, samples, right - left, samples)
    cover[top:bottom, left:right] = blocks.mean(axis=(1, 3))
    return cover


def _inside(shape: str, u: Array, v: Array) -> Mask:
    """Whether points are in the shape that fills the square [-1, 1]^2, v downwards."""
    if shape == "circle":
        return u**2 + v**2 <= 1
    box = np.maximum(abs(u), abs(v)) <= 1
    if shape == "square":
        return box
    if shape == "triangle":  # the tip is on top
        return box & (2 * abs(u) <= v + 1)
    return box & (np.minimum(abs(u), abs(v)) <= _ARM)
