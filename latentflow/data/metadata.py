"""``metadata.jsonl`` and ``metadata.csv``: file_name with any of text, label, mask and weight."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from latentflow.documents import decode, parse_json
from latentflow.errors import UserError, shown

from .columns import Said, refuse_synonyms, rename, said, unused
from .folder import Folder
from .members import METADATA_BYTES, File, read_bytes

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Row:
    """What the metadata say of one picture."""

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
