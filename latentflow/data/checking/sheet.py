"""A contact sheet: many pictures of a set at one glance, each with its caption or class."""

from __future__ import annotations

import math
from collections import Counter

from PIL import Image, ImageDraw, ImageFont

from latentflow.errors import one_line

from ..examples import Example, Source
from ..parallel import map_threaded
from ..read import to_rgb

_GAP, _TEXT, _PAPER, _INK = 8, 13, (250, 250, 250), (40, 40, 40)


def contact_sheet(source: Source, most: int = 80, columns: int = 10, cell: int = 112) -> Image.Image:
    """Up to ``most`` pictures, spread evenly over the set and its classes, whole and upright.

    Args:
        source: pictures that can be read.
        most: number of pictures.
        columns: of the sheet.
        cell: pixels, the longer side of each picture.
    """
    return strip(spread(source, most), columns, cell)


def strip(examples: list[Example], columns: int = 10, cell: int = 112) -> Image.Image:
    """These examples in rows of ``columns``."""
    columns = max(1, min(columns, len(examples)))
    rows = math.ceil(len(examples) / columns)
    width, height = cell + _GAP, cell + _GAP + _TEXT
    paper = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), _PAPER)
    pen = ImageDraw.Draw(paper)
    font = ImageFont.load_default(_TEXT - 3)
    pictures = map_threaded(lambda example: _small(example, cell), examples)
    for index, (example, picture) in enumerate(zip(examples, pictures, strict=True)):
        x, y = _GAP + index % columns * width, _GAP + index // columns * height
        paper.paste(picture, (x + (cell - picture.width) // 2, y + (cell - picture.height) // 2))
        pen.text((x, y + cell), _fitting(example, pen, font, cell), fill=_INK, font=font)
    return paper


def spread(source: Source, most: int) -> list[Example]:
    """Up to ``most`` examples: as many of each class as there are, the rest in turn; evenly spaced in each."""
    examples = list(source.examples)
    if len(examples) <= most:
        return examples
    counts = Counter(example.label if source.classes else None for example in examples)
    seen: Counter[str | None] = Counter()
    places: list[tuple[float, int]] = []
    for index, example in enumerate(examples):
        label = example.label if source.classes else None
        # Halving the gaps again and again: any first few of a class are spread over all of it.
        places.append((_halved(seen[label], counts[label]), index))
        seen[label] += 1
    chosen = sorted(index for _, index in sorted(places)[:most])
    return [examples[index] for index in chosen]


def _halved(place: int, count: int) -> float:
    """The turn of entry ``place`` of ``count`` when entries are taken at 0, 1/2, 1/4, 3/4, 1/8, ... of them."""
    bits = max(1, (count - 1).bit_length())
    return float(int(f"{place:0{bits}b}"[::-1], 2) * count / 2**bits)


def _small(example: Example, cell: int) -> Image.Image:
    with example.open() as image:
        image.draft(None, (cell, cell))
        picture = to_rgb(image)
    scale = cell / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)


def _fitting(
    example: Example, pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int
) -> str:
    text = one_line(example.text or example.label or example.name)
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"
