"""From annotations to a source, the same way for all kinds of data: nothing is dropped without a note or an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...errors import UserError, few
from ..dataset import Colours, Example, FileExample, Kind, Source
from .annotations import RowAnnotation, class_name, parse_row, text_in
from .files import File, Member

Condition = Literal["auto", "none", "class", "text"]
MissingCaption = Literal["error", "empty", "skip"]
Masks = Literal["auto", "none", "alpha"]


@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """The settings of ``find_source``, as the reader of every kind gets them."""

    condition: Condition = "auto"
    missing_caption: MissingCaption = "error"
    masks: Masks = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    colours: Colours = "srgb"

    @property
    def unused_masks(self) -> str:
        """The end of a note on masks that were found: empty where they are used."""
        return "" if self.masks == "auto" else f", not used (--masks {self.masks})"


def annotated_example(name: str, image: File, mask: File | None, annotation: RowAnnotation) -> FileExample:
    """Return the example of an image file with its annotation."""
    first, *more = annotation.texts or (None,)
    return FileExample(
        name, first, annotation.label, path=image, mask=mask, texts=tuple(more), weight=annotation.weight
    )


def table_examples(
    rows: Iterable[tuple[str, Mapping[str, object], Mapping[str, Member | None]]],
    ours: Mapping[str, str],
    image: str = "image",
    folder: Path = Path(),
    class_names: Sequence[str] | None = None,
) -> Iterable[FileExample]:
    """Yield the example of every row of a table of any kind (CSV, parquet, saved data set, hub).

    Args:
        rows: for each row its name in error messages, its values by the table's own column names, and the members
            that hold its image and mask by our names.
        ours: our names of the columns by their own.
        image: our name of the column with the images; those that are no members are paths.
        folder: the folder that relative paths start from.
        class_names: names of the classes where the table has numbers.

    Raises:
        UserError: a value is of the wrong type; a row has no image; a path leads out of the folder.
    """
    for number, (where, values, members) in enumerate(rows):
        row = {ours[name]: value for name, value in values.items()}
        if class_names is not None:
            row["label"] = class_name(class_names, row.get("label"), where)
        files = {
            name: members[name] if name in members else _path_in(row, name, folder, where)
            for name in (image, "mask")
        }
        if (file := files[image]) is None:
            raise UserError(f"{where} holds no image", "Give its image, or leave the row out.")
        name = f"row {number:08d}" if image in members else str(row[image])
        yield annotated_example(name, file, files["mask"], parse_row(row, where))


def _path_in(row: Mapping[str, object], column: str, folder: Path, where: str) -> Path | None:
    """Return the file that a column names: an absolute path as it is, any other below ``folder``."""
    name = text_in(row, column, where)
    if name is not None and ".." in Path(name).parts:
        raise UserError(
            f"{where}: {name} leads out of the folder", "Write the absolute path if that is meant."
        )
    return None if name is None else folder / name


def source_of_rows(
    data: str,
    examples: Sequence[FileExample],
    request: DataRequest,
    lacks: str,
    notes: Sequence[str] = (),
    root: Path | None = None,
) -> Source:
    """Return the source of examples with all their annotations; captions win over classes.

    ``lacks`` names, for the user, what captions and classes are read from.

    Raises:
        UserError: captions or classes are asked for and there are none; and as for ``build_source``.
    """
    kind, kind_notes = _decide(data, examples, request.condition, lacks)
    masks = sum(example.mask is not None for example in examples)
    mask_notes = [f"masks of {masks} images{request.unused_masks}"] if masks else []
    return build_source(data, examples, kind, request, [*notes, *kind_notes, *mask_notes], root)


def _decide(
    data: str, examples: Sequence[Example], condition: Condition, lacks: str
) -> tuple[Kind, list[str]]:
    """Choose what to condition on, and write the note on it."""
    has_text, has_label = any(e.text for e in examples), any(e.label for e in examples)
    if condition == "none":
        return "unconditional", ["unconditional, as asked: captions and classes are not used"]
    for asked, found, what in (("text", has_text, "captions"), ("class", has_label, "classes")):
        if condition == asked and not found:
            raise UserError(f"there are no {what} in {data}", f"Add them ({lacks}), or use --condition none.")
    if condition == "text" or (condition == "auto" and has_text):
        both = has_label and condition == "auto"
        return "text", ["labels found as well, not used (--condition decides)"] if both else []
    if has_label:
        return "class", []
    return "unconditional", [f"unconditional: {data} holds neither captions nor classes ({lacks})"]


def build_source(
    data: str,
    examples: Sequence[Example],
    kind: Kind,
    request: DataRequest,
    notes: Sequence[str],
    root: Path | None = None,
) -> Source:
    """Return the source of these examples as requested, in the order of their names.

    Raises:
        UserError: captions or classes are missing and the request does not say what to do; two examples have one name.
    """
    names: set[str] = set()
    for example in examples:
        if example.name in names:
            raise UserError(f"two images are named {example.name}", "Rename one of them.")
        names.add(example.name)
    kept, missing_notes = _complete(
        sorted(examples, key=lambda example: example.name), kind, request.missing_caption
    )
    notes = [*notes, *missing_notes]
    if request.masks == "alpha":
        notes.append("masks from the alpha channels: what is transparent is to be repainted")
    if request.masks != "auto" or request.colours != "srgb":
        kept = [_as_requested(example, request) for example in kept]
    classes = tuple(sorted({e.label or "" for e in kept}, key=_numbers_first)) if kind == "class" else ()
    if classes:
        notes.append(f"{len(classes)} classes: {few(classes, 12)}")
    if several := sum(bool(example.texts) for example in kept):
        notes.append(f"{several} images have several captions: each use draws one of them")
    if weighted := sum(example.weight != 1 for example in kept):
        notes.append(f"{weighted} images have a weight other than 1: it multiplies their loss")
    return Source(data, tuple(kept), kind, classes, tuple(notes), root)


def _complete(
    examples: list[Example], kind: Kind, missing: MissingCaption
) -> tuple[list[Example], list[str]]:
    """Return the examples with the annotations of ``kind`` alone, and a note on those that lacked them."""
    if kind == "unconditional":
        return [dataclasses.replace(example, text=None, texts=(), label=None) for example in examples], []
    what = "caption" if kind == "text" else "class"
    complete = [example for example in examples if (example.text if kind == "text" else example.label)]
    without = [e.name for e in examples if not (e.text if kind == "text" else e.label)]
    if without and (missing == "error" or (missing == "empty" and kind == "class")):
        empty = "empty (an empty caption) or " if kind == "text" else ""
        raise UserError(
            f"{len(without)} of {len(examples)} images have no {what}: {few(without)}",
            f"Add them, or choose --missing-caption {empty}skip (leave these images out).",
        )
    if not complete:
        raise UserError(f"no image has a {what}", "Use --condition none for an unconditional model.")
    fate = "left out" if missing == "skip" else "given the empty caption"
    notes = [f"{len(without)} images without a {what}, {fate}: {few(without)}"] if without else []
    kept = complete if missing == "skip" else examples
    if kind == "class":
        return [dataclasses.replace(example, text=None, texts=()) for example in kept], notes
    return [example if example.text else dataclasses.replace(example, text="") for example in kept], notes


def _as_requested(example: Example, request: DataRequest) -> Example:
    """Return an example with the masks and colours of the request; what is drawn has neither."""
    if not isinstance(example, FileExample):
        return example
    mask = {"auto": example.mask, "none": None, "alpha": example.path}[request.masks]
    return dataclasses.replace(example, mask=mask, colours=request.colours)


def _numbers_first(label: str) -> tuple[int, int, str]:
    """Return a key that sorts whole numbers by value (2 before 10), before words."""
    return (0, int(label), label) if label.isdecimal() and len(label) < 100 else (1, 0, label)
