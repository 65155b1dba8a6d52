"""Label maps: which label each pixel of an image has (semantic layouts), in palette, grey or colour-coded images.

In a palette image the label of a pixel is its index, in a grey one its value; 255 is a pixel without a label, as in
Pascal VOC, ADE20K and Cityscapes. A colour image is read by a table of labels that has colours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..errors import UserError, few, plural, reading
from ..utils.files import decode
from .images import decoding, loaded, name_of
from .sources.files import read_bytes

#: (name, "#rrggbb" or "" where it has no colour) of every label, in the order of their ids
Labels: TypeAlias = tuple[tuple[str, str], ...]

NO_LABEL = 255  # in a map of bytes
_LINE = re.compile(r"(?P<name>.*?)(?:\s+(?P<colour>#[0-9a-fA-F]{6}))?")


def read_label_file(path: str | Path) -> Labels:
    """Return the labels that a text file lists, a line each in the order of their ids: a name, or a name and #rrggbb.

    Raises:
        UserError: it cannot be read; it lists none, or more than 255; a name or a colour is missing or stands there
            twice.
    """
    file = Path(path).expanduser()
    fix = "Write a label on each line, in the order of their ids: sky #80c0ff"
    with reading(file, OSError, fix=fix):
        lines = decode(read_bytes(file, 2**20), str(file)).splitlines()
    labels = []
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line.strip())
        if match is None or not match["name"]:
            raise UserError(f"{file}, line {number}, has no name: {line!r}", fix)
        labels.append((match["name"], (match["colour"] or "").lower()))
    if not 1 <= len(labels) <= NO_LABEL:
        raise UserError(f"{file} lists {plural(len(labels), 'label')}", "List 1 to 255.")
    for place, what in enumerate(("name", "colour")):
        values = [label[place] for label in labels if label[place]]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise UserError(f"{file} has the {what} {twice[0]} twice", "Give each label its own.")
    return tuple(labels)


def numbered(count: int, palette: Sequence[str] = ()) -> Labels:
    """Return ``count`` labels that are called by their ids, with the colours of a palette."""
    colours = [*palette[:count], *[""] * (count - len(palette))]
    return tuple((str(number), colour) for number, colour in enumerate(colours))


def palette_of(image: Image.Image) -> tuple[str, ...]:
    """Return the colours of a palette image as "#rrggbb"; none of an image of another mode."""
    if image.mode != "P":
        return ()
    values = image.getpalette("RGB") or []
    return tuple("#{:02x}{:02x}{:02x}".format(*values[i : i + 3]) for i in range(0, len(values) - 2, 3))


def read_label_ids(image: Image.Image, labels: Labels = ()) -> NDArray[np.uint8]:
    """Return the label of each pixel, (H, W), upright; ``NO_LABEL`` where there is none.

    Args:
        image: of mode P, 1, L or I; or in the colours of ``labels``.
        labels: that there are; empty: any.

    Raises:
        UserError: the image has labels beyond these or colours that are none of theirs, is a JPEG, or cannot be
            decoded.
    """
    name = name_of(image)
    if image.format in ("JPEG", "MPO"):
        raise UserError(f"{name} is a JPEG, whose compression changes labels", "Save label maps as PNG.")
    loaded(image)
    with decoding(name):
        upright = ImageOps.exif_transpose(image)
    if upright.mode in ("P", "L") or upright.mode.startswith("I") or upright.mode == "1":
        ids = np.asarray(upright).astype(np.int64)
    else:
        ids = _by_colour(upright, labels, name)
    known = len(labels) or NO_LABEL
    beyond = np.unique(ids[(ids != NO_LABEL) & ((ids >= known) | (ids < 0))])
    if len(beyond):
        there = f"there are {plural(known, 'label')}, 0 to {known - 1}" if labels else "labels are 0 to 254"
        raise UserError(
            f"{name} has the label{'s' * (len(beyond) > 1)} {few(beyond.tolist())}, and {there}",
            "Pixels without a label have 255. List all labels in a file: --control-labels FILE.",
        )
    return ids.astype(np.uint8)


def _by_colour(image: Image.Image, labels: Labels, name: str) -> NDArray[np.int64]:
    """Return the label of each pixel of an image in the labels' colours; transparent pixels have none."""
    coloured = {int(colour[1:], 16): number for number, (_, colour) in enumerate(labels) if colour}
    if not coloured:
        raise UserError(
            f"{name} is in colour, and the labels have no colours",
            "Save label maps as palette images or as grey images of ids, or list the labels with their colours in a "
            "file: --control-labels FILE.",
        )
    with decoding(name):
        pixels = np.asarray(image.convert("RGBA")).astype(np.int64)
    codes = (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]
    values, places = np.unique(codes, return_inverse=True)
    found = np.array([coloured.get(int(value), -1) for value in values])[places.reshape(codes.shape)]
    found[pixels[..., 3] == 0] = NO_LABEL
    if (strange := np.unique(codes[found < 0])).size:
        listed = few([f"#{int(value):06x}" for value in strange])
        raise UserError(
            f"{name} has colours that are no label's: {listed}",
            f"The labels' colours: {few([colour for _, colour in labels if colour], 10)}. Save label maps without "
            "antialiasing, and not as JPEG.",
        )
    ids: NDArray[np.int64] = found
    return ids


def to_label_image(ids: NDArray[np.uint8], labels: Labels) -> Image.Image:
    """Return a label map (H, W) as a palette image in the labels' colours; of those without one, greys."""
    image = Image.fromarray(ids).convert("L")
    palette = []
    for number in range(256):
        colour = labels[number][1] if number < len(labels) else ""
        palette += [*bytes.fromhex(colour[1:])] if colour else [number] * 3
    image.putpalette(palette)
    return image
