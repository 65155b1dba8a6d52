"""Enlarged pictures, and sheets of several."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def enlarged(picture: Image, scale: int) -> Image:
    """The picture ``scale`` times as wide and high."""
    from PIL.Image import Resampling

    from ..memory import memory_phase

    with memory_phase("draw"):
        return picture.resize((picture.width * scale, picture.height * scale), Resampling.LANCZOS)


def sheet(pictures: list[Image], columns: int) -> Image:
    """All pictures, of one size, on one white sheet, row by row."""
    from PIL import Image

    width, height = pictures[0].size
    paper = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white")
    for i, picture in enumerate(pictures):
        place = (i % columns * width, i // columns * height)
        paper.paste(picture, place, picture if picture.mode == "RGBA" else None)
    return paper
