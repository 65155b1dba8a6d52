"""Annotations of images: the rows of a table (CSV, JSON lines, parquet, Arrow) and the meaning of their columns."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError, nearest, shown
from ...utils.files import decode, parse_json, refuse_no_text
from .files import METADATA_BYTES, File, read_bytes

HEAVIEST = 1e6  # weight of an image's loss: more only ends in updates that are not finite
COLUMNS = ("image", "file_name", "text", "label", "mask", "weight")
_SYNONYMS = {
    "text": ("caption", "captions", "prompt", "description", "texts"),
    "label": ("class", "classes", "category", "labels", "class_name"),
    "mask": ("masks", "mask_file", "mask_file_name", "mask_path", "mask_image"),
    "weight": ("weights", "loss_weight", "sample_weight"),
}
_NUMBERED = re.compile(r"text_([0-9]{1,9})")
_QUOTE = "Write it in quotes."


@dataclass(frozen=True, slots=True)
class RowAnnotation:
    """The captions of an image (none, one or several), its class or None, and the factor on its loss."""

    texts: tuple[str, ...] = ()
    label: str | None = None
    weight: float = 1.0


def parse_row(row: Mapping[str, object], where: str) -> RowAnnotation:
    """Return the annotation in a row's ``text`` (a string or a list), ``text_1``, ..., ``label`` and ``weight``.

    ``where`` begins error messages: the file and the line.

    Raises:
        UserError: a value is of the wrong type.
    """
    numbered = sorted((int(match[1]), name) for name in row if (match := _NUMBERED.fullmatch(name)))
    texts: list[str] = []
    for name in ("text", *(name for _, name in numbered)):
        texts += _texts(row.get(name), f"{where}: {name}")
    return RowAnnotation(tuple(texts), _label(row.get("label"), where), _weight(row.get("weight"), where))


def _texts(value: object, where: str) -> list[str]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where} is {shown(value)}, not a string or a list of strings", _QUOTE)
    for text in texts:
        refuse_no_text(text, where)
    return [text.strip() for text in texts if text.strip()]


def _label(value: object, where: str) -> str | None:
    if isinstance(value, str):
        refuse_no_text(value, f"{where}: label")
        return value.strip() or None
    if value is None or isinstance(value, int):
        return None if value is None else str(value)
    raise UserError(f"{where}: label is {shown(value)}, neither a string nor a whole number", _QUOTE)


def _weight(value: object, where: str) -> float:
    if value is None or value == "":
        return 1.0
    try:
        weight = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 < weight <= HEAVIEST:
        raise UserError(
            f"{where}: weight is {shown(value)}",
            f"Give a number above 0, at most {HEAVIEST:,.0f} (1 is usual); to leave an image out, leave its row out.",
        )
    return weight


def text_in(row: Mapping[str, object], column: str, where: str) -> str | None:
    """Return the text in a column, stripped; None where it is empty or absent.

    Raises:
        UserError: it is not text.
    """
    value = row.get(column)
    if value is None or isinstance(value, str):
        return (value or "").strip() or None
    raise UserError(f"{where}: {column} is {shown(value)}, not a string", _QUOTE)


def class_name(names: Sequence[str], label: object, where: str) -> object:
    """Return the name of a class that `datasets` writes as a number; None for -1, its way to write "not known".

    Raises:
        UserError: no class has that number.
    """
    if not isinstance(label, int) or label == -1:
        return None if label == -1 else label
    if not 0 <= label < len(names):
        raise UserError(f"{where}: label is {label}, of {len(names)} classes", "Write the table again.")
    return names[label]


def holds_captions(column: str) -> bool:
    """Return whether a column is ``text`` or one of ``text_1``, ``text_2``, ..."""
    return column == "text" or _NUMBERED.fullmatch(column) is not None


def rename(columns: Iterable[str], renamed: Mapping[str, str], where: str) -> dict[str, str]:
    """Return our name of every column of a table, by its own; ``renamed`` maps ours to theirs (``--columns``).

    Raises:
        UserError: a name of ``renamed`` is unknown; two columns have or get the same name.
    """
    own = list(columns)
    if twice := [name for name, count in Counter(own).items() if count > 1]:
        raise UserError(f"{where} has two columns named '{twice[0]}'", "Rename one of them.")
    for ours, theirs in renamed.items():
        if ours not in COLUMNS:
            raise UserError(
                f"--columns: '{ours}' is not one of {', '.join(COLUMNS)}", _did_you_mean(ours, COLUMNS)
            )
        if theirs not in own:
            raise UserError(
                f"{where} has no column '{theirs}' (--columns {ours} {theirs})",
                f"{_did_you_mean(theirs, own)}Its columns: {', '.join(own)}",
            )
        if ours != theirs and ours in own and ours not in renamed.values():
            raise UserError(
                f"{where} has both '{ours}' and '{theirs}', which --columns names '{ours}'",
                "Rename or drop one of the two.",
            )
    ours_of = {theirs: ours for ours, theirs in renamed.items()}
    return {name: ours_of.get(name, name) for name in own}


def unused_columns(ours: Mapping[str, str], image: str) -> list[str]:
    """Return a table's own names of the columns that are not read; ``image`` is our name of the images' column."""
    read = {image, *COLUMNS} - ({"image", "file_name"} - {image})
    return [theirs for theirs, name in ours.items() if name not in read and not holds_captions(name)]


def refuse_synonyms(where: str, columns: Collection[str]) -> None:
    """Refuse a table whose captions, classes, masks or weights would go unread, being called by another word."""
    for column, synonyms in _SYNONYMS.items():
        missing = ["text", "label"] if column in ("text", "label") else [column]
        if any(name in missing or ("text" in missing and holds_captions(name)) for name in columns):
            continue
        for synonym in synonyms:
            if synonym in columns:
                raise UserError(
                    f"{where} has no {' or '.join(missing)}, but '{synonym}'",
                    f"Rename it to '{column}', or add --columns {column} {synonym}.",
                )


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    guess = nearest(name, names)
    return f"Did you mean '{guess}'? " if guess else ""


def read_records(file: File, path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield line number (from 1) and content of every row of a ``.csv`` or of JSON lines; errors name it ``path``.

    Raises:
        UserError: it is not UTF-8, or a line cannot be read.
    """
    text = io.StringIO(decode(read_bytes(file, METADATA_BYTES), str(path)), newline="")
    if path.suffix.lower() != ".csv":
        for number, line in enumerate(text, start=1):
            if line.strip():
                yield number, _json_row(f"{path}, line {number}", line)
        return
    try:
        reader = csv.DictReader(text, strict=True)
        rename(reader.fieldnames or (), {}, str(path))  # refuses two columns of one name
        for row in reader:
            if None in row:
                raise UserError(
                    f"{path}, line {reader.line_num} has more cells than the first line has columns",
                    'Put text that holds commas in double quotes: "red, round".',
                )
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.reader.line_num} cannot be read: {error}", "Mend that line."
        ) from None


def _json_row(where: str, text: str) -> dict[str, object]:
    fix = 'Write one {"file_name": ..., "text": ...} a line.'
    row = parse_json(text, where, fix)
    if not isinstance(row, dict):
        raise UserError(f"{where} is not an object", fix)
    return row
