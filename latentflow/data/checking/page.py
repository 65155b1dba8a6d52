"""The report of `latentflow check` as a web page, with a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

from PIL import Image, ImageDraw, ImageFont

from ...errors import UserError, one_line, plural
from ...utils.html_page import Page
from ..cache.tensors import map_threaded
from ..dataset import Example, Source
from ..images import to_rgb
from ..splits import NEAR
from .report import Report, Suggestion

_GAP, _TEXT, _PAPER, _INK = 8, 13, (250, 250, 250), (40, 40, 40)
_GROUPS, _SIZES = 12, 12  # groups of near duplicates, and sizes, that are shown
_SHOWN = 80  # images on the contact sheet


def contact_sheet(source: Source, most: int = _SHOWN, columns: int = 10, cell: int = 112) -> Image.Image:
    """Draw up to ``most`` images, spread evenly over the set and its classes, whole and upright.

    Args:
        source: images that can be read.
        most: number of images.
        columns: of the sheet.
        cell: pixels, the longer side of each image.
    """
    shown = [source.examples[index] for index in source.spread(most)]
    return labelled_sheet(shown, columns=columns, cell=cell)


def labelled_sheet(
    examples: Sequence[Example], texts: Sequence[str] = (), columns: int = 10, cell: int = 112
) -> Image.Image:
    """Draw images, each with a text below it; default: its caption, class or name. See `contact_sheet`."""
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
        text = shortened = one_line(texts[index] if texts else example.text or example.label or example.name)
        while shortened and pen.textlength(text, font) > cell:
            shortened = shortened[:-1]
            text = shortened + "…"
        pen.text((x, y + cell), text, fill=_INK, font=font)
    return sheet


def _thumbnail(example: Example, cell: int) -> Image.Image:
    with example.open() as image:
        image.draft(None, (cell, cell))
        rgb = to_rgb(image)
    if example.control_kinds:
        rgb = _beside_its_controls(rgb, example)
    scale = cell / max(rgb.size)
    size = max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale))
    return rgb.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)


def _beside_its_controls(rgb: Image.Image, example: Example) -> Image.Image:
    """Return an image with its control images on the right; a grey area where one cannot be read."""
    kinds = example.control_kinds
    row = Image.new("RGB", ((1 + len(kinds)) * rgb.width, rgb.height), (128, 128, 128))
    row.paste(rgb, (0, 0))
    for place, kind in enumerate(kinds, start=1):
        with suppress(UserError):
            control = example.open_control(kind)
            assert control is not None
            row.paste(to_rgb(control).resize(rgb.size, Image.Resampling.NEAREST), (place * rgb.width, 0))
    return row


def report_page(report: Report, source: Source | None, suggestions: Sequence[Suggestion] = ()) -> Page:
    """Build the page: what to do next, what is wrong, how the images look, then the details."""
    page = Page(one_line(f"Data: {report.data}"))
    page.text(one_line(f"{report.headline}. {report.verdict[0].upper()}{report.verdict[1:]}."))
    if report.problems:
        page.heading("Problems")
        page.list(map(one_line, report.problems))
    if suggestions:
        page.heading("A first training")
    for suggestion in suggestions:
        page.text(f"{suggestion.title[0].upper()}{suggestion.title[1:]}:")
        page.code(suggestion.command)
        page.table(["choice", "why"], list(suggestion.reasons.items()))
    if report.warnings:
        page.heading("Worth knowing")
        page.list(map(one_line, report.warnings))
    if source is not None and len(source):
        page.heading("Contact sheet")
        some = f"{_SHOWN} of {len(source)} images, evenly spread"
        caption = f"All {plural(len(source), 'image')}" if len(source) <= _SHOWN else some
        page.image(contact_sheet(source), caption, "webp")
    page.heading("Facts")
    page.list(map(one_line, (*report.notes, *report.facts())))
    if len(report.sizes) > 1:
        page.text("Width to height, by the nearest of the usual shapes:")
        page.bars(report.aspects)
        page.text("Images whose short side has at least this many pixels:")
        page.bars({f"{side} px": count for side, count in report.reach.items()})
        sizes = page.details(f"Sizes: {len(report.sizes)}, the most frequent first")
        sizes.table(["width x height", "images"], list(report.sizes.items())[:_SIZES])
    if report.classes:
        page.heading(plural(len(report.classes), "class"))
        page.bars({one_line(name): count for name, count in report.classes.items()})
    captions = report.caption_facts
    if captions.common:
        page.heading("The most frequent words")
        page.bars(captions.common)
    if captions.repeated:
        page.details("Captions shared by several images").table(
            ["caption", "images"], captions.repeated.items()
        )
    if source is not None and (report.near_duplicates or report.duplicates):
        page.heading("Duplicates")
        equal, near = plural(len(report.duplicates), "group"), plural(len(report.near_duplicates), "group")
        page.text(f"{equal} of equal files, {near} of {NEAR}.")
        examples = {example.name: example for example in source.examples}
        for names in report.near_duplicates[:_GROUPS]:
            shown = [examples[name] for name in names[:8]]
            page.image(labelled_sheet(shown, cell=88), one_line(" = ".join(names[:8])), "webp")
    _file_lists(page, report)
    return page


def _file_lists(page: Page, report: Report) -> None:
    """Add the names of all files that something is to be known about, folded."""
    groups = [" = ".join(names) for names in (*report.duplicates, *report.near_duplicates)]
    lists = {
        "Unreadable files, left out": report.unreadable,
        "Masks that cannot be used": report.unreadable_masks,
        "Colour profiles that cannot be used": report.unusable_profiles,
        "Files in another format than the name says": report.misnamed,
        "Animated images, of which only the first frame is used": dict.fromkeys(report.animated, ""),
        "Images without a caption": dict.fromkeys(report.caption_facts.missing, ""),
        "Groups of duplicates": dict.fromkeys(groups, ""),
    }
    if any(lists.values()):
        page.heading("Files")
    for what, reasons in lists.items():
        if reasons:
            explained = any(reasons.values())
            rows = [[one_line(name), one_line(why)][: 1 + explained] for name, why in reasons.items()]
            page.details(f"{what}: {len(rows)}").table(["file", "why"][: 1 + explained], rows)
