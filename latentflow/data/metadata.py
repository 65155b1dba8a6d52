"""``metadata.jsonl`` and ``metadata.csv``: file_name with any of text, label and mask."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from latentflow.errors import UserError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
_MEANT = {
    "text": ("caption", "captions", "prompt", "description", "texts"),
    "label": ("class", "classes", "category", "labels", "class_name"),
    "mask": ("masks", "mask_file", "mask_file_name", "mask_path", "mask_image"),
}


@dataclass(frozen=True)
class Row:
    """What the metadata say of one picture; None or "" where they say nothing."""

    line: int
    text: str | None
    label: str | None
    mask: str | None  # relative to the folder, posix form


@dataclass(frozen=True)
class Metadata:
    """The rows by file name (relative to the folder, posix form), in the order of the file."""

    path: Path
    rows: Mapping[str, Row]

    @property
    def has_text(self) -> bool:
        return any(row.text for row in self.rows.values())

    @property
    def has_label(self) -> bool:
        return any(row.label for row in self.rows.values())


def read_metadata(root: Path) -> Metadata | None:
    """The metadata file of a folder, None where there is none.

    Raises:
        UserError: there are two; a line cannot be read; a file is listed twice, or is not there.
    """
    found = [root / name for name in METADATA_NAMES if (root / name).is_file()]
    if not found:
        return None
    if len(found) > 1:
        raise UserError(f"{root} holds both {METADATA_NAMES[0]} and {METADATA_NAMES[1]}", "Keep one of them.")
    path = found[0]
    rows: dict[str, Row] = {}
    columns: set[str] = set()
    for line, record in _records(path):
        columns.update(record)
        name = _file_name(path, line, record)
        if name in rows:
            both = f"lines {rows[name].line} and {line}"
            raise UserError(f"{path} lists {name} twice, in {both}", "Keep one of the two lines.")
        text, label, mask = (_value(path, line, record, column) for column in ("text", "label", "mask"))
        rows[name] = Row(line, text, label, _inside(path, line, mask) if mask else None)
    _refuse_synonyms(path, columns)
    _refuse_absent(root, path, list(rows), "files", "file_name")
    _refuse_absent(root, path, [row.mask for row in rows.values() if row.mask], "masks", "mask")
    _refuse_itself(path, rows)
    return Metadata(path, rows)


def _records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Line number (from 1) and content of every row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file)
                for row in reader:
                    yield reader.line_num, {str(key): value for key, value in row.items()}
            else:
                for number, text in enumerate(file, start=1):
                    if text.strip():
                        yield number, _json_row(path, number, text)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}", "Save it as UTF-8 text.") from None


def _json_row(path: Path, number: int, text: str) -> dict[str, object]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {number} is not JSON: {error}", 'Write one {"file_name": ..., "text": ...} a line.'
        ) from None
    if not isinstance(row, dict):
        raise UserError(
            f"{path}, line {number} is not an object", 'Write one {"file_name": ..., "text": ...} a line.'
        )
    return row


def _file_name(path: Path, line: int, record: Mapping[str, object]) -> str:
    name = record.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{path}, line {line} has no file_name (it has {', '.join(record) or 'nothing'})",
            "Name the column file_name; it is relative to the folder of the metadata.",
        )
    return _inside(path, line, name)


def _inside(path: Path, line: int, name: str) -> str:
    """A path relative to the folder, in posix form."""
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"{path}, line {line}: {name} leads out of the folder", "Give a path below it.")
    return relative.as_posix()


def _value(path: Path, line: int, record: Mapping[str, object], column: str) -> str | None:
    value = record.get(column)
    if value is None:
        return None
    if isinstance(value, str):
        return value.strip()
    if column == "label" and isinstance(value, int):
        return str(value)
    raise UserError(f"{path}, line {line}: {column} is {value!r}, not a string", "Write it in quotes.")


def _refuse_synonyms(path: Path, columns: set[str]) -> None:
    for column, synonyms in _MEANT.items():
        missing = ["mask"] if column == "mask" else ["text", "label"]
        for synonym in synonyms:
            if synonym in columns and not columns & set(missing):
                raise UserError(
                    f"{path} has no {' or '.join(missing)}, but '{synonym}'", f"Rename it to '{column}'."
                )


def _refuse_absent(root: Path, path: Path, names: list[str], what: str, column: str) -> None:
    absent = [name for name in names if not (root / name).is_file()]
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
