"""Rows of tables in text: CSV with any separator, and JSON lines."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from ...errors import UserError
from ...utils.files import decode, parse_json
from .annotations import is_known_column, rename
from .files import METADATA_BYTES, File, read_bytes

CSV_SUFFIXES = (".csv", ".tsv")
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_SEPARATOR_LINE = re.compile(r'sep=([^\w\s"]|\t)', re.IGNORECASE)


def read_records(
    file: File, path: Path, named: Collection[str] = ()
) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield line number (from 1) and content of every row of a ``.csv`` or ``.tsv``, or of JSON lines.

    Args:
        path: its name in errors.
        named: columns of it that the user names; they tell what separates the columns.

    Raises:
        UserError: it is not UTF-8, or a line cannot be read.
    """
    text = decode(read_bytes(file, METADATA_BYTES), str(path))
    if path.suffix.lower() in CSV_SUFFIXES:
        yield from _csv_rows(text, path, named)
        return
    fix = 'Write one {"file_name": ..., "text": ...} a line.'
    for number, line in enumerate(io.StringIO(text, newline=""), start=1):
        if line.strip():
            row = parse_json(line, where := f"{path}, line {number}", fix)
            if not isinstance(row, dict):
                raise UserError(f"{where} is not an object", fix)
            yield number, row


def _csv_rows(text: str, path: Path, named: Collection[str]) -> Iterator[tuple[int, dict[str, object]]]:
    lines = io.StringIO(text, newline="")
    first = next(lines, "")
    stated = _SEPARATOR_LINE.fullmatch(first.rstrip("\r\n"))  # Excel's own line for it, before the header
    header = next(lines, "") if stated else first
    separator = stated[1] if stated else _separator(header.rstrip("\r\n"), named)
    # Spaces before the quotes of a cell are left out where names have them too; else they and the quotes are text.
    spaced = f"{separator} " in header
    lines.seek(len(first) if stated else 0)
    rows = csv.reader(lines, delimiter=separator, skipinitialspace=spaced, strict=True)

    def where() -> str:
        return f"{path}, line {rows.line_num + bool(stated)}"

    try:
        columns = [name.strip() for name in next(rows, [])]
        width = len(columns)
        while columns and not columns[-1]:  # spreadsheets write columns without a name after the last one
            columns.pop()
        rename(columns, {}, str(path))  # refuses two columns of one name
        for cells in filter(any, rows):
            if any(cells[width:]):
                raise UserError(
                    f"{where()} has more cells than the first line has columns",
                    f"Put text that holds {_SEPARATORS.get(separator, separator)} in double quotes: "
                    f'"red{separator} round".',
                )
            line = rows.line_num + bool(stated)
            yield line, {name: cells[i] if i < len(cells) else None for i, name in enumerate(columns)}
    except csv.Error as error:
        raise UserError(f"{where()} cannot be read: {error}", "Mend that line.") from None


def _separator(header: str, named: Collection[str]) -> str:
    """Return the character between a table's columns, by its first line: the first of ``_SEPARATORS`` that makes a
    column that is ``named`` or of a known name, else the one that makes most columns."""
    start = header[: csv.field_size_limit()]  # of a longer line the reader of the rows complains
    cells = {
        separator: next(csv.reader([start], delimiter=separator, skipinitialspace=True), [])
        for separator in _SEPARATORS
    }
    for separator, names in cells.items():
        if any(name.strip() in named or is_known_column(name) for name in names):
            return separator
    return max(cells, key=lambda separator: len(cells[separator]))
