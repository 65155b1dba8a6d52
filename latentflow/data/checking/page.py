"""The report as a web page."""

from __future__ import annotations

from collections.abc import Iterable

from latentflow.errors import one_line
from latentflow.html_page import Page, Section

from ..examples import Source
from .report import NEAR, Report
from .sheet import contact_sheet, strip
from .suggest import Suggestion

_GROUPS = 12  # of near duplicates that are shown
_SIZES = 12


def report_page(report: Report, source: Source | None, suggestion: Suggestion | None) -> Page:
    """One page: what to do next, what is wrong, how the pictures look, then the details."""
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
        page.picture(contact_sheet(source), f"Some of {len(source)} pictures, evenly spread", "webp")
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
    page.text("Pictures whose short side has at least so many pixels:")
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
            page.details("Captions of several pictures").table(
                ["caption", "pictures"], facts.repeated.items()
            )
        _names(page, "pictures without a caption", [[name] for name in facts.missing], ["file"])


def _duplicates(page: Page, report: Report, source: Source) -> None:
    if not report.near_duplicates and not report.duplicates:
        return
    page.heading("Duplicates")
    page.text(f"{len(report.duplicates)} groups of equal files, {len(report.near_duplicates)} of {NEAR}.")
    examples = {example.name: example for example in source.examples}
    for names in report.near_duplicates[:_GROUPS]:
        page.picture(
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
        page, "animated pictures, of which the first frame is used", [[n] for n in report.animated], ["file"]
    )
    page.list(map(one_line, report.notes))


def _names(section: Section, what: str, rows: Iterable[Iterable[str]], header: list[str]) -> None:
    cells = [[one_line(cell) for cell in row] for row in rows]
    if cells:
        section.details(f"{len(cells)} {what}").table(header, cells)
