"""Which of the set's objects does a picture show? Plain segmentation: no network, nothing learnt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from .shape_drawing import AREA, COLOURS, SHAPES, SINK, Array, Mask, Placed, coverage

_FOREGROUND = 115.0  # distance from white, in levels of 255: half of the palest colour's
_STRAY = 0.005  # specks of less than this share of the picture are not objects
_GROUND = 60.0  # mean distance from white that the ground may have
_SAME_COLOUR = 68.0  # half the distance of the two closest colours
_UNIFORM = 0.8  # share of an object that must have its colour


@dataclass(frozen=True)
class Found(Placed):
    """An object as measured; ``overlap`` is its intersection over union with the ideal shape of its area."""

    overlap: float


def find_objects(image: Image.Image) -> list[Found] | str:
    """The objects on the white ground of a square picture, or what makes it unreadable.

    A colour is the median inside an object, half the width follows from the area under that colour's soft
    mask, and the shape is the one of the four that overlaps best when drawn with that area at its place.
    """
    rgb = np.asarray(image.convert("RGB")).astype(np.float64)
    side = rgb.shape[0]
    from_white = np.linalg.norm(255 - rgb, axis=2)
    labels, count = ndimage.label(from_white > _FOREGROUND)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    kept = [label for label in range(1, count + 1) if sizes[label] >= _STRAY * side**2]
    if not kept:
        return "there is no object"
    gap, owner = _nearest(np.where(np.isin(labels, kept), labels, 0))
    pixel = side / 32
    ground = from_white[gap > 2 * pixel]
    if ground.size == 0 or ground.mean() > _GROUND:
        return "the ground is not white"
    found = []
    for label in kept:
        region = (owner == label) & (gap <= 2 * pixel)
        item = _identify(rgb, from_white, labels == label, region)
        if isinstance(item, str):
            return item
        found.append(item)
    return found


def _nearest(labels: npt.NDArray[np.int32]) -> tuple[Array, npt.NDArray[np.int32]]:
    """Distance of every pixel to the nearest labelled one, and its label."""
    gap, (rows, columns) = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    return gap, labels[rows, columns]


def _identify(rgb: Array, from_white: Array, mask: Mask, region: Mask) -> Found | str:
    side = rgb.shape[0]
    # The deepest two fifths are inside even where edges are soft and a cross is thin.
    core = rgb[mask & (from_white >= np.quantile(from_white[mask], 0.6))]
    colour = _colour(np.median(core, axis=0))
    if colour is None:
        return "an object has none of the colours"
    depth = 255 - np.array(COLOURS[colour], dtype=np.float64)
    soft = (255 - rgb) @ depth / (depth @ depth)
    # An edge is a blend of the colour and white; what is off that line is another colour.
    off = np.linalg.norm(255 - rgb - soft[:, :, None] * depth, axis=2)
    if (off[mask] < _SAME_COLOUR).mean() < _UNIFORM:
        return "an object has more than one colour"
    soft = np.clip(2 * (soft - 0.5) + 0.5, 0, 1) * region  # steeper edges undo some blur and noise
    area = soft.sum() / side**2
    grid = (np.arange(side) + 0.5) / side
    x, y = (soft.sum(axis=0) @ grid / soft.sum(), soft.sum(axis=1) @ grid / soft.sum())
    candidates = []
    for shape in SHAPES:
        half = float(np.sqrt(area / AREA[shape]))
        centre = y - SINK[shape] * half
        ideal_mask = coverage(shape, half, x, centre, side)
        overlap = np.minimum(soft, ideal_mask).sum() / np.maximum(soft, ideal_mask).sum()
        candidates.append(Found(colour, shape, half, float(x), float(centre), float(overlap)))
    return max(candidates, key=lambda item: item.overlap)


def _colour(rgb: Array) -> str | None:
    distances = {name: float(np.linalg.norm(rgb - np.array(value))) for name, value in COLOURS.items()}
    name = min(distances, key=lambda colour: distances[colour])
    return name if distances[name] < _SAME_COLOUR else None
