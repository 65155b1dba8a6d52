"""Label maps of the procedural set of shapes: drawn exactly, and read from images by the exact checker.

Label 0 is the ground; each colour and shape together is a label of its own, in that colour.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from ..images import to_pil
from ..labels import Labels
from .shapes import COLOURS, SHAPES, Spec, layout, read_objects, render

LabelMap = npt.NDArray[np.uint8]


def _colour(colour: str, number: int) -> str:
    """Return the colour of a label: a shade of its object's for each shape, so that all differ."""
    red, green, blue = COLOURS[colour]
    return f"#{red:02x}{green:02x}{blue + 5 * number:02x}"


#: ground, then every colour and shape; blue differs by the shape, so that colours tell labels apart
LABELS: Labels = (
    ("ground", "#ffffff"),
    *(
        (f"{colour} {shape}", _colour(colour, number))
        for colour in COLOURS
        for number, shape in enumerate(SHAPES)
    ),
)
_IDS = {name: number for number, (name, _) in enumerate(LABELS)}


def label_map(spec: Spec, resolution: int, seed: int | None = None) -> LabelMap:
    """Return the label of each pixel of `render`'s image, (resolution, resolution): an object's where it covers at
    least half of the pixel."""
    _, masks = render(spec, resolution, seed)
    ids = np.zeros((resolution, resolution), dtype=np.uint8)
    for item, mask in zip(layout(spec), masks.numpy(), strict=True):
        ids[mask] = _IDS[f"{item.colour} {item.shape}"]
    return ids


def read_label_map(image: Image.Image | Tensor) -> LabelMap:
    """Return the labels that an image shows, (H, W), as the exact checker sees it: ground where no object can be read.

    Args:
        image: square; a tensor is (3, H, W) in [-1, 1].
    """
    opened = to_pil(image) if isinstance(image, Tensor) else image
    ids = np.zeros(opened.size[::-1], dtype=np.uint8)
    found = read_objects(opened)
    for item in [] if isinstance(found, str) else found:
        if not isinstance(item, str):
            ids[item.pixels] = _IDS[f"{item.colour} {item.shape}"]
    return ids


def mean_iou(asked: Sequence[LabelMap], shown: Sequence[LabelMap]) -> float:
    """Return the mean, over all objects of the label maps that were ``asked`` for, of intersection over union with the
    pixels that have the object's label in the maps that are ``shown``.

    The ground is left out: it is most of every image, and would lift the figure of any.
    """
    shares = []
    for wanted, seen in zip(asked, shown, strict=True):
        for label in np.unique(wanted[wanted > 0]):
            one, other = wanted == label, seen == label
            shares.append((one & other).sum() / (one | other).sum())
    return float(np.mean(shares))
