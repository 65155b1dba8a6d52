"""The report of `latentflow check` as a web page, with a contact sheet."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont

from ...errors import one_line
from ...utils.html_page import Page, Section
from ..cache.tensors import map_threaded
from ..dataset import Example, Source
from ..pixels import to_rgb
from .report import NEAR, Report
from .suggest import Suggestion

_GAP, _TEXT, _PAPER, _INK = 8, 13, (250, 250, 250), (40, 40, 40)


def contact_sheet(source: Source, most: int = 80, columns: int = 10, cell: int = 112) -> Image.Image:
    """Up to ``most`` images, spread evenly over the set and its classes, whole and upright.

    Args:
        source: images that can be read.
        most: number of images.
        columns: of the sheet.
        cell: pixels, the longer side of each image.
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
    images = map_threaded(lambda example: _small(example, cell), examples)
    for index, (example, image) in enumerate(zip(examples, images, strict=True)):
        x, y = _GAP + index % columns * width, _GAP + index // columns * height
        paper.paste(image, (x + (cell - image.width) // 2, y + (cell - image.height) // 2))
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
        rgb = to_rgb(image)
    scale = cell / max(rgb.size)
    size = max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale))
    return rgb.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)


def _fitting(
    example: Example, pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int
) -> str:
    text = one_line(example.text or example.label or example.name)
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


_GROUPS = 12  # of near duplicates that are shown
_SIZES = 12


def report_page(report: Report, source: Source | None, suggestion: Suggestion | None) -> Page:
    """One page: what to do next, what is wrong, how the images look, then the details."""
    page = Page(one_line(f"Data: {report.data}"))
    page.text(one_line(f"{report.headline}. {report.verdict[0].upper()}{report.verdict[1:]}."))
    if report.problems:
        page.heading("Problems")
        page.list(map(one_line, report.problems))
    if suggestion is not None:
        page.heading("A first training")
        page.code(suggestion.command)
        page.table(["choice", "why"], list(suggestion.reasons.items()))
    if report.warnings:
        page.heading("Worth knowing")
        page.list(map(one_line, report.warnings))
    if source is not None and len(source):
        page.heading("Contact sheet")
        page.image(contact_sheet(source), f"Some of {len(source)} images, evenly spread", "webp")
    _sizes(page, report)
    _said(page, report)
    if source is not None:
        _duplicates(page, report, source)
    _files(page, report)
    return page


def _sizes(page: Page, report: Report) -> None:
    if not report.sizes:
        return
    page.heading("Sizes and shapes")
    page.text("Width to height, by the nearest of the usual shapes:")
    page.bars(report.aspects)
    page.text(f"A square cut from the centre keeps {report.kept_by_square_crop:.0%} of the area on average.")
    page.text("Images whose short side has at least so many pixels:")
    page.bars({f"{side} px": count for side, count in report.reach.items()})
    sizes = list(report.sizes.items())
    page.details(f"{len(sizes)} different sizes, the most frequent").table(
        ["width x height", "pictures"], sizes[:_SIZES]
    )
    page.table(
        ["formats", "modes", "colour profiles other than sRGB", "turned by EXIF", "animated", "with a mask"],
        [
            [
                ", ".join(f"{name} {count}" for name, count in report.formats.items()),
                ", ".join(f"{name} {count}" for name, count in report.modes.items()),
                one_line(", ".join(f"{name} {count}" for name, count in report.profiles.items())) or "none",
                report.rotated,
                len(report.animated),
                report.masks,
            ]
        ],
    )


def _said(page: Page, report: Report) -> None:
    if report.classes:
        page.heading(f"{len(report.classes)} classes")
        page.bars({one_line(name): count for name, count in report.classes.items()})
    if report.condition == "text":
        facts = report.caption_facts
        lengths = facts.shortest, facts.median, facts.longest
        page.heading("Captions")
        page.table(
            ["different", "missing", "words: fewest", "median", "most", "vocabulary", "words used once"],
            [(facts.different, len(facts.missing), *lengths, facts.vocabulary, facts.once)],
        )
        page.text("The most frequent words:")
        page.bars(facts.common)
        if facts.repeated:
            page.details("Captions of several images").table(["caption", "pictures"], facts.repeated.items())
        _names(page, "images without a caption", [[name] for name in facts.missing], ["file"])


def _duplicates(page: Page, report: Report, source: Source) -> None:
    if not report.near_duplicates and not report.duplicates:
        return
    page.heading("Duplicates")
    page.text(f"{len(report.duplicates)} groups of equal files, {len(report.near_duplicates)} of {NEAR}.")
    examples = {example.name: example for example in source.examples}
    for names in report.near_duplicates[:_GROUPS]:
        page.image(
            strip([examples[name] for name in names[:8]], cell=88), one_line(" = ".join(names[:8])), "webp"
        )
    groups = [[one_line(" = ".join(names))] for names in (*report.duplicates, *report.near_duplicates)]
    _names(page, "groups", groups, ["files"])


def _files(page: Page, report: Report) -> None:
    page.heading("Files")
    _names(page, "files that cannot be read and are skipped", report.unreadable.items(), ["file", "why"])
    _names(page, "masks that cannot be used", report.unreadable_masks.items(), ["file", "why"])
    _names(page, "colour profiles that cannot be used", report.unusable_profiles.items(), ["file", "why"])
    _names(page, "files named as another format", report.misnamed.items(), ["file", "format"])
    _names(
        page, "animated images, of which the first frame is used", [[n] for n in report.animated], ["file"]
    )
    page.list(map(one_line, report.notes))


def _names(section: Section, what: str, rows: Iterable[Iterable[str]], header: list[str]) -> None:
    cells = [[one_line(cell) for cell in row] for row in rows]
    if cells:
        section.details(f"{len(cells)} {what}").table(header, cells)
