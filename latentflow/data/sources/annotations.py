"""Annotations of images: the columns of any table, and metadata.jsonl or metadata.csv of a folder."""

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
from .files import Folder
from .members import METADATA_BYTES, File, read_bytes

HEAVIEST = 1e6  # weight of an image's loss: more only ends in updates that are not finite
KNOWN = ("image", "file_name", "text", "label", "mask", "weight")
_MEANT = {
    "text": ("caption", "captions", "prompt", "description", "texts"),
    "label": ("class", "classes", "category", "labels", "class_name"),
    "mask": ("masks", "mask_file", "mask_file_name", "mask_path", "mask_image"),
    "weight": ("weights", "loss_weight", "sample_weight"),
}
_NUMBERED = re.compile(r"text_([0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class Said:
    """What a row says: captions (none, one or several), a label or None, and a factor on the loss."""

    texts: tuple[str, ...] = ()
    label: str | None = None
    weight: float = 1.0


def said(row: Mapping[str, object], where: str) -> Said:
    """The meaning of a row's ``text`` (a string or a list), ``text_1``, ``text_2``, ..., ``label`` and ``weight``.

    ``where`` begins messages: the file and the line.

    Raises:
        UserError: a value is of the wrong type.
    """
    load_batch = sorted((int(m[1]), name) for name in row if (m := _NUMBERED.fullmatch(name)))
    texts: list[str] = []
    for name in ("text", *(name for _, name in load_batch)):
        texts += _texts(row.get(name), f"{where}: {name}")
    return Said(tuple(texts), _label(row.get("label"), where), _weight(row.get("weight"), where))


def class_name(names: Sequence[str], label: object, where: str) -> object:
    """The name of a class that `datasets` writes as a number; None for -1, its word for "not known".

    Raises:
        UserError: there is no such number.
    """
    if not isinstance(label, int) or label == -1:
        return None if label == -1 else label
    if not 0 <= label < len(names):
        raise UserError(f"{where}: label is {label}, of {len(names)} classes", "Write the table again.")
    return names[label]


def is_text(column: str) -> bool:
    """Whether a column holds captions: ``text`` or ``text_1``, ``text_2``, ..."""
    return column == "text" or _NUMBERED.fullmatch(column) is not None


def rename(columns: Iterable[str], meant: Mapping[str, str], where: str) -> dict[str, str]:
    """Our name of every column of a table, by its own name; ``meant`` maps ours to theirs (``--columns``).

    Raises:
        UserError: one of the names is not there; two columns would have the same name.
    """
    own = list(columns)
    for ours, theirs in meant.items():
        if ours not in KNOWN:
            raise UserError(f"--columns: '{ours}' is none of {', '.join(KNOWN)}", _near(ours, KNOWN))
        if theirs not in own:
            raise UserError(
                f"{where} has no column '{theirs}' (--columns {ours} {theirs})",
                f"{_near(theirs, own)}Its columns: {', '.join(own)}",
            )
        if ours != theirs and ours in own and ours not in meant.values():
            raise UserError(
                f"{where} has both '{ours}' and '{theirs}', which --columns names '{ours}'",
                "Rename or drop one of the two.",
            )
    ours_of = {theirs: ours for ours, theirs in meant.items()}
    return {name: ours_of.get(name, name) for name in own}


def unused(ours: Mapping[str, str], image: str) -> list[str]:
    """Return a table's own names of columns that are not used; ``image`` is our name of the one with the images."""
    read = {image, *KNOWN} - ({"image", "file_name"} - {image})
    return [name for name, one in ours.items() if one not in read and not is_text(one)]


def refuse_synonyms(where: str, columns: Collection[str]) -> None:
    """Refuses a table that says with another word what would otherwise be passed over."""
    for column, synonyms in _MEANT.items():
        missing = ["text", "label"] if column in ("text", "label") else [column]
        if any(name in missing or ("text" in missing and is_text(name)) for name in columns):
            continue
        for synonym in synonyms:
            if synonym in columns:
                raise UserError(
                    f"{where} has no {' or '.join(missing)}, but '{synonym}'",
                    f"Rename it to '{column}', or add --columns {column} {synonym}.",
                )


def _texts(value: object, where: str) -> list[str]:
    if value is None:
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{where} is {shown(value)}, not a string or a list of strings", "Write it in quotes."
        )
    for text in texts:
        refuse_no_text(text, where)
    return [text.strip() for text in texts if text.strip()]


def _label(value: object, where: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        refuse_no_text(value, f"{where}: label")
        return value.strip() or None
    if isinstance(value, int):
        return str(value)
    raise UserError(
        f"{where}: label is {shown(value)}, neither a string nor a whole number", "Write it in quotes."
    )


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


def _near(name: str, names: Iterable[str]) -> str:
    guess = nearest(name, names)
    return f"Did you mean '{guess}'? " if guess else ""


METADATA_NAMES = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Row:
    """What the metadata say of one image."""

    line: int
    said: Said
    mask: str | None  # relative to the folder, posix form


@dataclass(frozen=True)
class Metadata:
    """The rows by file name (relative to the folder, posix form), in the order of the file."""

    path: Path
    rows: Mapping[str, Row]
    unused: tuple[str, ...] = ()  # columns

    @property
    def has_text(self) -> bool:
        return any(row.said.texts for row in self.rows.values())

    @property
    def has_label(self) -> bool:
        return any(row.said.label for row in self.rows.values())


def read_metadata(folder: Folder, meant: Mapping[str, str]) -> Metadata | None:
    """The metadata file of a folder, None where there is none; ``meant`` renames columns (``columns.rename``).

    Raises:
        UserError: there are two; a line cannot be read; a file is listed twice, or is not there.
    """
    found = [name for name in METADATA_NAMES if folder.holds(name)]
    if not found and meant:
        raise UserError(
            f"--columns is given, but {folder.root} has no metadata.jsonl or metadata.csv", "Leave it out."
        )
    if not found:
        return None
    if len(found) > 1:
        raise UserError(
            f"{folder.root} holds both {METADATA_NAMES[0]} and {METADATA_NAMES[1]}", "Keep one of them."
        )
    path = folder.root / found[0]
    rows: dict[str, Row] = {}
    records = list(read_records(folder.file(found[0]), path))
    columns = dict.fromkeys(column for _, record in records for column in record)
    ours = rename(columns, meant, str(path))
    for line, record in records:
        record = {ours[name]: value for name, value in record.items()}
        where = f"{path}, line {line}"
        name = _inside(where, _required(record, where))
        if name in rows:
            both = f"lines {rows[name].line} and {line}"
            raise UserError(f"{path} lists {name} twice, in {both}", "Keep one of the two lines.")
        mask = text_of(record, "mask", where)
        rows[name] = Row(line, said(record, where), _inside(where, mask) if mask else None)
    refuse_synonyms(str(path), set(ours.values()))
    _refuse_absent(folder, path, list(rows), "files", "file_name")
    _refuse_absent(folder, path, [row.mask for row in rows.values() if row.mask], "masks", "mask")
    _refuse_itself(path, rows)
    return Metadata(path, rows, tuple(unused(ours, "file_name")))


def read_records(file: File, path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Line number (from 1) and content of every row of a ``.csv``, or of JSON lines; ``path`` names it in messages.

    Raises:
        UserError: it is not UTF-8, or a line cannot be read.
    """
    text = io.StringIO(decode(read_bytes(file, METADATA_BYTES), str(path)), newline="")
    if path.suffix.lower() != ".csv":
        for number, line in enumerate(text, start=1):
            if line.strip():
                yield number, _json_row(path, number, line)
        return
    try:
        reader = csv.DictReader(text, strict=True)
        twice = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]
        if twice:
            raise UserError(f"{path} has two columns named '{twice[0]}'", "Rename one of them.")
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


def _json_row(path: Path, number: int, text: str) -> dict[str, object]:
    where, fix = f"{path}, line {number}", 'Write one {"file_name": ..., "text": ...} a line.'
    row = parse_json(text, where, fix)
    if not isinstance(row, dict):
        raise UserError(f"{where} is not an object", fix)
    return row


def text_of(record: Mapping[str, object], column: str, where: str) -> str | None:
    """The text in a column, stripped; None where it is empty or not there.

    Raises:
        UserError: it is no text.
    """
    value = record.get(column)
    if value is None or isinstance(value, str):
        return (value or "").strip() or None
    raise UserError(f"{where}: {column} is {shown(value)}, not a string", "Write it in quotes.")


def _required(record: Mapping[str, object], where: str) -> str:
    name = record.get("file_name")
    if name is not None and not isinstance(name, str):
        raise UserError(f"{where}: file_name is {shown(name)}, not a string", "Write it in quotes.")
    if not name:
        raise UserError(
            f"{where} has no file_name (it has {', '.join(record) or 'nothing'})",
            "Name the column file_name; it is relative to the folder of the metadata.",
        )
    return name


def _inside(where: str, name: str) -> str:
    """A path relative to the folder, in posix form."""
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"{where}: {name} leads out of the folder", "Give a path below it.")
    return relative.as_posix()


def _refuse_absent(folder: Folder, path: Path, names: list[str], what: str, column: str) -> None:
    absent = [name for name in names if not folder.holds(name)]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise UserError(
            f"{path} names {len(absent)} {what} that are not there: {', '.join(absent[:5])}{more}",
            f"{column} is relative to the folder of the metadata.",
        )


def _refuse_itself(path: Path, rows: Mapping[str, Row]) -> None:
    for name, row in rows.items():
        if row.mask == name:
            raise UserError(
                f"{path}, line {row.line}: {name} is given as its own mask",
                "Name the mask's file, or use --masks alpha to read masks from the alpha channels.",
            )
