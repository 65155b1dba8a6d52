"""Masks: random ones for training, and those that users bring, 1 (white) = repaint, 0 (black) = keep.

A shape of random masks is a function (size, rng) -> (H, W) bool array, True = repaint, and a line in
``MASK_SHAPES``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ..errors import UserError, unknown
from .images import decoding, loaded, name_of

Size: TypeAlias = tuple[int, int]
MaskShape: TypeAlias = Callable[[Size, np.random.Generator], np.ndarray]

#: Shares of the shapes in training. "full" is what plain generation trains on: nothing is known.
DEFAULT_SHAPES: Mapping[str, float] = {
    "rectangle": 0.2, "strokes": 0.2, "ellipse": 0.1, "half-plane": 0.1, "frame": 0.1, "full": 0.3,
}  # fmt: skip
OWN = "data"  # among the shapes in training: the mask that came with the image


def random_masks(
    shapes: Mapping[str, float], size: Size, generators: Sequence[np.random.Generator]
) -> Tensor:
    """Draw one mask with each generator.

    Args:
        shapes: key of ``MASK_SHAPES`` -> its share; shares need not add up to 1.
        size: (height, width) in pixels.
        generators: each alone decides the shape and form of its mask.

    Returns:
        (B, 1, H, W) float32 in {0, 1}.
    """
    names, shares = list(shapes), np.array(list(shapes.values()), dtype=float)
    drawn = [
        MASK_SHAPES[names[rng.choice(len(names), p=shares / shares.sum())]](size, rng) for rng in generators
    ]
    return torch.from_numpy(np.stack(drawn)[:, None].astype(np.float32))


def check_shapes(shapes: Mapping[str, float], more: Sequence[str] = ()) -> None:
    """Refuse shares that cannot be drawn from; ``more`` are further names that the caller knows.

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
    """All of the image: plain generation."""
    return np.ones(size, dtype=bool)


def none(size: Size, rng: np.random.Generator) -> np.ndarray:
    """No pixel: the whole image is given."""
    return np.zeros(size, dtype=bool)


def _grid(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Return row and column of each pixel's centre, in [0, 1]."""
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


log = logging.getLogger(__name__)

# Levels of 255 that the channels of a grey image may differ by, and that JPEG leaves around an edge.
_TOLERANCE = 16
_LOSSY = ("JPEG", "MPO")


def read_mask(
    image: Image.Image, size: tuple[int, int] | None = None, *, threshold: float | None = None
) -> Image.Image:
    """Return a mask as one 8-bit channel (mode "L"), upright: 255 repaint, 0 keep, between them soft.

    Grey images of any mode are read by their brightness, on the scale of 0..1, 0..255 or 0..65535 that their
    largest value fits in (so a label map of 0 and 1 is a mask too). A grey photograph looks like a soft
    mask and is read as one. In a JPEG, levels next to black or white become black or white.

    Transparency, where there is any, is read as a layer painted in an image editor: transparent parts are kept,
    greys count as much as they are opaque (brightness times alpha), and a layer painted in one colour other than
    grey is to be repainted as much as it is opaque. Only black on transparent is refused: the paint, or the hole
    in it, may be meant.

    Args:
        image: in any of Pillow's modes; EXIF rotation is applied.
        size: (width, height) of the result; a mask of another size is resized to the nearest pixel, and a
            warning is logged.
        threshold: in [0, 1]; a luminance of at least this repaints, everything else is kept. Makes a mask of any
            image.

    Raises:
        UserError: the image is in colour and there is no threshold; it cannot be decoded; the threshold is not
            in [0, 1].
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(
            f"threshold is {threshold}", "Give a luminance from 0 (black) to 1 (white), such as 0.5."
        )
    name = f"the mask {getattr(image, 'filename', '')}".rstrip()
    lossy = image.format in _LOSSY
    loaded(image, name)
    with decoding(name):
        upright = ImageOps.exif_transpose(image)
    levels = _levels(upright, name, coloured=threshold is not None)
    if threshold is not None:
        levels = np.where(levels >= threshold * 255, np.uint8(255), np.uint8(0))
    elif lossy:
        levels = np.where(levels <= _TOLERANCE, np.uint8(0), levels)
        levels = np.where(levels >= 255 - _TOLERANCE, np.uint8(255), levels)
    mask = Image.fromarray(levels)
    if size is None or mask.size == size:
        return mask
    log.warning("%s is %d x %d, the image %d x %d: resized to the nearest pixel", name, *mask.size, *size)
    return mask.resize(size, Image.Resampling.NEAREST)


def alpha_mask(image: Image.Image) -> Image.Image | None:
    """Return the alpha channel as a mask, upright: transparent parts (alpha 0) are 255, to be repainted.

    Return None where no pixel is transparent.
    """
    with decoding(name_of(image)):
        upright = ImageOps.exif_transpose(image)
        if not upright.has_transparency_data:
            return None
        mask = ImageOps.invert(upright.convert("RGBA").getchannel("A"))
    return mask if mask.getbbox() else None


def without_alpha(image: Image.Image) -> Image.Image:
    """Return the image upright, with the colours that its file holds beneath transparent parts."""
    with decoding(name_of(image)):
        upright = ImageOps.exif_transpose(image)
        return upright.convert("RGBA").convert("RGB") if upright.has_transparency_data else upright


def _levels(image: Image.Image, name: str, *, coloured: bool) -> NDArray[np.uint8]:
    """Return how much of each pixel is to be repainted, (H, W); colours are an error unless ``coloured``."""
    if image.mode.startswith("I") or image.mode == "F":
        return _full_scale(np.asarray(image), name)
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        colours, alpha = rgba[..., :3], rgba[..., 3]
        if alpha.min() < 255:
            return _painted_levels(colours, alpha, name, coloured)
        image = Image.fromarray(np.ascontiguousarray(colours))
    if image.mode in ("1", "L"):
        return _full_scale(np.asarray(image.convert("L")), name)
    colours = np.asarray(image.convert("RGB"))
    if not coloured and not _is_grey(colours):
        raise _not_a_mask(name)
    return _full_scale(_luminance(colours), name)


def _painted_levels(
    colours: NDArray[np.uint8], alpha: NDArray[np.uint8], name: str, coloured: bool
) -> NDArray[np.uint8]:
    """Return the levels (H, W) of an image (H, W, 3) with transparent parts."""
    seen = colours[alpha > 0]
    if not len(seen):
        return np.zeros_like(alpha)
    if coloured or _is_grey(seen):
        if not coloured and seen.max() <= _TOLERANCE:
            raise UserError(
                f"{name} is black on transparent: its paint may be meant, or the hole in it",
                "Paint in white what is to be repainted.",
            )
        return np.rint(_luminance(colours) * (alpha / 255)).astype(np.uint8)
    if int(np.ptp(seen, axis=0).max()) > _TOLERANCE:
        raise _not_a_mask(name)
    return alpha


def _is_grey(colours: NDArray[np.uint8]) -> bool:
    return int(np.ptp(colours, axis=-1).max()) <= _TOLERANCE


def _luminance(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the brightness (H, W) of colours (H, W, 3)."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(colours)).convert("L"))


def _full_scale(values: NDArray[np.generic], name: str) -> NDArray[np.uint8]:
    """Bring numbers on any of the scales that programs write to 0..255."""
    numbers = values.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise UserError(f"{name} holds infinite or undefined values", "Write numbers from 0 to 1.")
    full = next((limit for limit in (1.0, 255.0) if numbers.max() <= limit), 65535.0)
    return np.rint(numbers / full * 255).clip(0, 255).astype(np.uint8)


def _not_a_mask(name: str) -> UserError:
    return UserError(
        f"{name} is not a mask: it is in colour",
        "Give a grey image, white where to repaint and black where to keep, or a threshold in [0, 1] "
        "(bright enough is repainted).",
    )
