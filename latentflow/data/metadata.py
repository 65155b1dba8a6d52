"""``metadata.jsonl`` and ``metadata.csv``: file_name with text, label or both."""

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
}


@dataclass(frozen=True)
class Row:
    """What the metadata say of one picture; None or "" where they say nothing."""

    line: int
    text: str | None
    label: str | None


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
        rows[name] = Row(line, _value(path, line, record, "text"), _value(path, line, record, "label"))
    _refuse_synonyms(path, columns)
    _refuse_absent(root, path, rows)
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
    if columns & {"text", "label"}:
        return
    for column, synonyms in _MEANT.items():
        for synonym in synonyms:
            if synonym in columns:
                raise UserError(
                    f"{path} has neither text nor label, but '{synonym}'", f"Rename it to '{column}'."
                )


def _refuse_absent(root: Path, path: Path, rows: Mapping[str, Row]) -> None:
    absent = [name for name in rows if not (root / name).is_file()]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise UserError(
            f"{path} names {len(absent)} files that are not there: {', '.join(absent[:5])}{more}",
            "file_name is relative to the folder of the metadata.",
        )
