"""From images with their annotations to a source: one kind of condition, nothing dropped without a word; and their
masks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...errors import UserError, few
from ..dataset import Colours, Example, FileExample, Kind, Source
from .annotations import Metadata, Said
from .files import Folder
from .members import File, file_key

Masks = Literal["auto", "none", "alpha"]

_ENDING = "-mask"


@dataclass(frozen=True)
class MaskFiles:
    """The masks of a folder, by the name of their image; all names relative to the folder in posix form.

    Attributes:
        folder: the folder.
        listed: from the metadata's ``mask`` column.
        beside: named like the image with ``-mask`` added, in any format; hardly ever more than one.
    """

    folder: Folder
    listed: Mapping[str, str]
    beside: Mapping[str, list[str]]

    @property
    def named(self) -> set[str]:
        """The files that their name makes masks."""
        return {mask for masks in self.beside.values() for mask in masks}

    def files(self) -> dict[str, File]:
        """The mask of every image that has one.

        Raises:
            UserError: an image has several, and they differ.
        """
        found, root = dict(self.listed), self.folder.root
        for name, masks in self.beside.items():
            for mask in masks:
                first = found.setdefault(name, mask)
                if first != mask and file_key(self.folder.file(first)) != file_key(self.folder.file(mask)):
                    raise UserError(
                        f"{root / name} has two masks that differ: {root / first} and {root / mask}",
                        "Keep one of them (move the other away), or use --masks none.",
                    )
        return {name: self.folder.file(mask) for name, mask in found.items()}


def find_masks(folder: Folder, metadata: Metadata | None) -> MaskFiles:
    """The masks of a folder. What the metadata list as an image is no mask by its name."""
    rows = metadata.rows if metadata is not None else {}
    by_stem: dict[str, list[str]] = {}
    for name in folder.images:
        by_stem.setdefault(os.path.splitext(name)[0], []).append(name)  # noqa: PTH122 (as in folder.py)
    images: set[str] = set()
    beside: dict[str, list[str]] = {}
    for stem in sorted(by_stem, key=len):  # an image's stem is shorter than its mask's
        base = stem.removesuffix(_ENDING)
        if base != stem and base in images and not any(name in rows for name in by_stem[stem]):
            beside |= dict.fromkeys(by_stem[base], by_stem[stem])
        else:
            images.add(stem)
    listed = {name: row.mask for name, row in rows.items() if row.mask}
    return MaskFiles(folder, listed, beside)


Condition = Literal["auto", "none", "class", "text"]
MissingCaption = Literal["error", "empty", "skip"]

_FATES = {"empty": "given the empty caption", "skip": "left out"}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the user asks of the data, whatever their kind; see ``find_source``."""

    condition: Condition = "auto"
    missing_caption: MissingCaption = "error"
    masks: Masks = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    colours: Colours = "srgb"


def fields_of(said: Said) -> dict[str, Any]:
    """What a row says, as fields of an ``Example``."""
    first, *more = said.texts or (None,)
    return {"text": first, "texts": tuple(more), "label": said.label, "weight": said.weight}


def decide(
    examples: Iterable[Example], condition: Condition, where: str, lacks: str
) -> tuple[Kind, list[str]]:
    """What to condition on where captions win over labels, and the notes that say so.

    ``lacks`` names what would have to be there.

    Raises:
        UserError: what is asked for is not there.
    """
    has_text, has_label = False, False
    for example in examples:
        has_text, has_label = has_text or bool(example.text), has_label or bool(example.label)
    if condition == "none":
        return "unconditional", ["unconditional, as asked: captions and classes are not used"]
    wanted, there = {"text": ("captions", has_text), "class": ("classes", has_label)}.get(
        condition, ("", True)
    )
    if not there:
        raise UserError(f"there are no {wanted} in {where}", f"Add them ({lacks}), or use --condition none.")
    if condition == "text" or (condition == "auto" and has_text):
        more = (
            []
            if not has_label or condition == "text"
            else ["labels found as well, not used (--condition decides)"]
        )
        return "text", more
    if condition == "class" or has_label:
        return "class", []
    return "unconditional", [f"unconditional: {where} holds neither captions nor classes ({lacks})"]


def conditioned(
    examples: Sequence[Example], kind: Kind, missing: MissingCaption
) -> tuple[list[Example], list[str]]:
    """The examples as ``kind`` needs them, and what became of those that lack it.

    Raises:
        UserError: captions or classes are missing, and nothing is said about what to do.
    """
    if kind == "text":
        return _captioned(examples, missing)
    if kind == "class":
        return _labelled(examples, missing)
    return [dataclasses.replace(example, text=None, texts=(), label=None) for example in examples], []


def source_of(
    data: str,
    examples: Sequence[Example],
    kind: Kind,
    wanted: Wanted,
    notes: Sequence[str],
    root: Path | None = None,
) -> Source:
    """The source of these examples, in the order of their names.

    Raises:
        UserError: as for ``conditioned``; two examples have one name.
    """
    _refuse_equal_names(examples)
    kept, told = conditioned(sorted(examples, key=lambda example: example.name), kind, wanted.missing_caption)
    classes = tuple(sorted({e.label or "" for e in kept}, key=_numbers_first)) if kind == "class" else ()
    told = [*notes, *told]
    if classes:
        told.append(f"{len(classes)} classes: {few(classes, 12)}")
    several = sum(bool(example.texts) for example in kept)
    if several:
        told.append(f"{several} images have several captions: each use draws one of them")
    weighted = sum(example.weight != 1 for example in kept)
    if weighted:
        told.append(f"{weighted} images have a weight other than 1: it multiplies their loss")
    return Source(data, tuple(kept), kind, classes, tuple(told), root)


def masked(examples: Sequence[FileExample], masks: Masks) -> tuple[list[FileExample], list[str]]:
    """Examples with the masks that ``--masks`` asks for, and the notes that say where these come from."""
    count, notes = sum(example.mask is not None for example in examples), []
    if count:
        notes.append(
            f"masks of {count} images" + ("" if masks == "auto" else f", not used (--masks {masks})")
        )
    if masks == "none":
        return [dataclasses.replace(example, mask=None) for example in examples], notes
    if masks == "alpha":
        notes.append("masks from the alpha channels: what is transparent is to be repainted")
        return [dataclasses.replace(example, mask=example.path) for example in examples], notes
    return list(examples), notes


def _captioned(examples: Sequence[Example], missing: MissingCaption) -> tuple[list[Example], list[str]]:
    without = [example.name for example in examples if not example.text]
    if without and missing == "error":
        raise UserError(
            f"{len(without)} of {len(examples)} images have no caption: {few(without)}",
            "Add them, or choose --missing-caption empty (an empty caption) or skip (leave them out).",
        )
    if len(without) == len(examples):
        raise UserError("no image has a caption", "Use --condition none for an unconditional model.")
    if not without:
        return list(examples), []
    note = f"{len(without)} images without a caption, {_FATES[missing]}: {few(without)}"
    if missing == "skip":
        return [example for example in examples if example.text], [note]
    return [dataclasses.replace(example, text=example.text or "") for example in examples], [note]


def _labelled(examples: Sequence[Example], missing: MissingCaption) -> tuple[list[Example], list[str]]:
    without = [example.name for example in examples if not example.label]
    if without and missing != "skip":
        raise UserError(
            f"{len(without)} of {len(examples)} images have no class: {few(without)}",
            "Add them, or choose --missing-caption skip to leave these images out.",
        )
    if len(without) == len(examples):
        raise UserError("no image has a class", "Use --condition none for an unconditional model.")
    kept = [dataclasses.replace(e, text=None, texts=()) for e in examples if e.label]
    return kept, [f"{len(without)} images without a class, left out: {few(without)}"] if without else []


def _refuse_equal_names(examples: Iterable[Example]) -> None:
    seen: set[str] = set()
    for example in examples:
        if example.name in seen:
            raise UserError(f"two images are named {example.name}", "Rename one of them.")
        seen.add(example.name)


def _numbers_first(label: str) -> tuple[int, int, str]:
    """Labels that are whole numbers in their order (2 before 10), then words in theirs."""
    return (0, int(label), label) if label.isdecimal() and len(label) < 100 else (1, 0, label)
