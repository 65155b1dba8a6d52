"""The report of `latentflow check` as a web page, with a contact sheet."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from ...errors import one_line
from ...utils.html_page import Page
from ..cache.tensors import map_threaded
from ..dataset import Example, Source
from ..images import to_rgb
from ..splits import NEAR
from .report import Report
from .suggest import Suggestion

_GAP, _TEXT, _PAPER, _INK = 8, 13, (250, 250, 250), (40, 40, 40)
_GROUPS, _SIZES = 12, 12  # groups of near duplicates, and sizes, that are shown


def contact_sheet(source: Source, most: int = 80, columns: int = 10, cell: int = 112) -> Image.Image:
    """Draw up to ``most`` images, spread evenly over the set and its classes, whole and upright.

    Args:
        source: images that can be read.
        most: number of images.
        columns: of the sheet.
        cell: pixels, the longer side of each image.
    """
    return _sheet(choose_evenly(source, most), columns, cell)


def _sheet(examples: Sequence[Example], columns: int = 10, cell: int = 112) -> Image.Image:
    columns = max(1, min(columns, len(examples)))
    rows = math.ceil(len(examples) / columns)
    width, height = cell + _GAP, cell + _GAP + _TEXT
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_TEXT - 3)
    images = map_threaded(lambda example: _thumbnail(example, cell), examples)
    for index, (example, image) in enumerate(zip(examples, images, strict=True)):
        x, y = _GAP + index % columns * width, _GAP + index // columns * height
        sheet.paste(image, (x + (cell - image.width) // 2, y + (cell - image.height) // 2))
        text = shortened = one_line(example.text or example.label or example.name)
        while shortened and pen.textlength(text, font) > cell:
            shortened = shortened[:-1]
            text = shortened + "…"
        pen.text((x, y + cell), text, fill=_INK, font=font)
    return sheet


def _thumbnail(example: Example, cell: int) -> Image.Image:
    with example.open() as image:
        image.draft(None, (cell, cell))
        rgb = to_rgb(image)
    scale = cell / max(rgb.size)
    size = max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale))
    return rgb.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)


def choose_evenly(source: Source, most: int) -> list[Example]:
    """Choose up to ``most`` examples: equally many of each class while it has any, evenly spaced in it."""
    labels = [example.label if source.classes else None for example in source.examples]
    counts, seen = Counter(labels), Counter[str | None]()
    turns: list[tuple[float, int]] = []
    for index, label in enumerate(labels):
        # Halving the gaps again and again spreads any first few of a class over all of it.
        bits = max(1, (counts[label] - 1).bit_length())
        reversed_bits = f"{seen[label]:0{bits}b}"[::-1]
        turns.append((int(reversed_bits, 2) * counts[label] / 2**bits, index))
        seen[label] += 1
    return [source.examples[index] for index in sorted(index for _, index in sorted(turns)[:most])]


def report_page(report: Report, source: Source | None, suggestion: Suggestion | None) -> Page:
    """Build the page: what to do next, what is wrong, how the images look, then the details."""
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
    if report.sizes:
        _add_sizes(page, report)
    if report.classes:
        page.heading(f"{len(report.classes)} classes")
        page.bars({one_line(name): count for name, count in report.classes.items()})
    if report.condition == "text":
        _add_captions(page, report)
    if source is not None and (report.near_duplicates or report.duplicates):
        _add_duplicates(page, report, source)
    page.heading("Files")
    for what, reasons in (
        ("files that cannot be read and are skipped", report.unreadable),
        ("masks that cannot be used", report.unreadable_masks),
        ("colour profiles that cannot be used", report.unusable_profiles),
    ):
        _add_names(page, what, reasons.items(), ["file", "why"])
    _add_names(page, "files named as another format", report.misnamed.items(), ["file", "format"])
    animated = [[name] for name in report.animated]
    _add_names(page, "animated images, of which only the first frame is used", animated, ["file"])
    page.list(map(one_line, report.notes))
    return page


def _add_sizes(page: Page, report: Report) -> None:
    def listed(counts: Mapping[str, int]) -> str:
        return one_line(", ".join(f"{name} {count}" for name, count in counts.items())) or "none"

    page.heading("Sizes and shapes")
    page.text("Width to height, by the nearest of the usual shapes:")
    page.bars(report.aspects)
    page.text(f"A square cut from the centre keeps {report.kept_by_square_crop:.0%} of the area on average.")
    page.text("Images whose short side has at least this many pixels:")
    page.bars({f"{side} px": count for side, count in report.reach.items()})
    sizes = list(report.sizes.items())
    page.details(f"{len(sizes)} different sizes, the most frequent").table(
        ["width x height", "images"], sizes[:_SIZES]
    )
    facts = {
        "formats": listed(report.formats),
        "modes": listed(report.modes),
        "colour profiles other than sRGB": listed(report.profiles),
        "turned by EXIF": report.rotated,
        "animated": len(report.animated),
        "with a mask": report.masks,
    }
    page.table(list(facts), [list(facts.values())])


def _add_captions(page: Page, report: Report) -> None:
    facts = report.caption_facts
    numbers = {
        "different": facts.different,
        "missing": len(facts.missing),
        "words: fewest": facts.shortest,
        "median": facts.median,
        "most": facts.longest,
        "vocabulary": facts.vocabulary,
        "words used once": facts.once,
    }
    page.heading("Captions")
    page.table(list(numbers), [list(numbers.values())])
    page.text("The most frequent words:")
    page.bars(facts.common)
    if facts.repeated:
        page.details("Captions of several images").table(["caption", "images"], facts.repeated.items())
    _add_names(page, "images without a caption", [[name] for name in facts.missing], ["file"])


def _add_duplicates(page: Page, report: Report, source: Source) -> None:
    page.heading("Duplicates")
    page.text(f"{len(report.duplicates)} groups of equal files, {len(report.near_duplicates)} of {NEAR}.")
    examples = {example.name: example for example in source.examples}
    for names in report.near_duplicates[:_GROUPS]:
        shown = names[:8]
        page.image(_sheet([examples[name] for name in shown], cell=88), one_line(" = ".join(shown)), "webp")
    groups = [[" = ".join(names)] for names in (*report.duplicates, *report.near_duplicates)]
    _add_names(page, "groups", groups, ["files"])


def _add_names(page: Page, what: str, rows: Iterable[Iterable[str]], header: list[str]) -> None:
    """Add a folded table of names, if there are any."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    if cells:
        page.details(f"{len(cells)} {what}").table(header, cells)
