"""CSV and parquet tables: a row for each image, with its path or (parquet) its bytes."""

from __future__ import annotations

import functools
import os
import re
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError, few, nearest, reading, reason, shown
from ...utils.files import decode, parse_json
from ..dataset import FileExample, Source
from .annotations import (
    KNOWN,
    class_name,
    is_text,
    read_records,
    refuse_synonyms,
    rename,
    said,
    text_of,
    unused,
)
from .assemble import Wanted, decide, fields_of, masked, source_of
from .files import SUFFIXES
from .members import IMAGE_BYTES, Container, File, Member, refuse_large
from .paths import common_folder, many_paths

_PARTS = ("train", "test", "validation", "valid", "val", "dev")
_LOCK = threading.Lock()
# Times the size of a parquet file, of a group of rows that is larger than ``IMAGE_BYTES``.
MOST_UNPACKED = 100
_BUFFER = 2**16  # bytes that are read ahead; without, a row is read with all of its column in the group
_AGAIN = "Copy or download it again."


@dataclass(frozen=True, slots=True)
class Cell(Member):
    """The bytes in one cell of a parquet file."""

    table: Container
    group: int  # of rows
    row: int  # in the group
    column: str

    def _read(self, bound: int) -> bytes:
        self.table.open().close()  # unchanged
        with _LOCK:  # else every thread would read the same group
            values = _column(self.table, self.group, self.column, os.getpid())
        value = values[self.row].as_py()
        held: bytes | None = value["bytes"] if isinstance(value, Mapping) else value
        if held is None:
            raise UserError(f"{self} holds no image", _AGAIN)
        return held

    def __str__(self) -> str:
        return f"{self.table.path}: {self.column} of row {self.row} in group {self.group}"


def is_table(data: str) -> bool:
    """Whether DATA names CSV or parquet files, or a folder of parquet files and nothing else to read."""
    path = Path(data).expanduser()
    if path.is_dir():
        return bool(_parquet_files(path))
    return path.suffix.lower() in (".csv", ".parquet")


def read_table(data: str, wanted: Wanted) -> Source:
    """The rows of one CSV file, or of parquet files of the same columns.

    Paths are relative to the table's folder; absolute paths may lead anywhere, and the notes count them.

    Raises:
        UserError: a file is broken or not there; there is no column of images, or one of bytes and one of paths; an
            image is listed twice, or is not there; captions or classes are missing.
    """
    folder = Path(data).expanduser()
    paths = _parquet_files(folder) if folder.is_dir() else many_paths(data)
    _refuse_parts(data, paths)
    examples: list[FileExample] = []
    root, passed_over = common_folder(paths), dict[str, None]()  # columns
    for path in paths:
        prefix = "" if len(paths) == 1 else path.absolute().relative_to(root).with_suffix("").as_posix() + "/"
        read = _csv_rows if path.suffix.lower() == ".csv" else _parquet_rows
        found = list(read(path, wanted, passed_over))
        examples += [_example(path, prefix, *row) for row in found]
    if not examples:
        raise UserError(f"there are no rows in {data}", "Write one row for each image.")
    outside = _check_files(data, examples, root)
    kind, more = decide(examples, wanted.condition, data, "a column text or label")
    examples, told = masked(examples, wanted.masks)
    notes = [f"{len(examples)} rows of {few([path.name for path in paths])}", *outside, *more, *told]
    if passed_over:
        notes.append(f"columns not used: {few(passed_over)}")
    return source_of(data, examples, kind, wanted, notes, folder if folder.is_dir() else None)


_Row = tuple[str, File, File | None, dict[str, Any]]  # name, image, mask, what else is said


def _csv_rows(path: Path, wanted: Wanted, passed_over: dict[str, None]) -> Iterator[_Row]:
    records = list(read_records(path, path))
    if not records:
        return
    ours = _ours(path, list(records[0][1]), wanted)
    column = _image_column(path, ours.values())
    passed_over |= dict.fromkeys(unused(ours, column))
    for line, record in records:
        record = {ours[name]: value for name, value in record.items()}
        where = f"{path}, line {line}"
        place = text_of(record, column, where)
        if place is None:
            raise UserError(f"{where} names no image", "Give the path of one, or leave the line out.")
        mask = text_of(record, "mask", where)
        file = _place(path, place, where)
        yield place, file, _place(path, mask, where) if mask else None, fields_of(said(record, where))


def _parquet_rows(path: Path, wanted: Wanted, passed_over: dict[str, None]) -> Iterator[_Row]:
    file = _parquet(path)
    container = Container.of(path)
    ours = _ours(path, file.schema_arrow.names, wanted)
    column = _image_column(path, ours.values())
    passed_over |= dict.fromkeys(unused(ours, column))
    theirs = {ours_: name for name, ours_ in ours.items()}
    held = {name for name in ("image", "mask") if name in theirs and _holds_bytes(file, theirs[name])}
    spoken = [theirs[name] for name in theirs if name not in held and (name in KNOWN or is_text(name))]
    classes = _class_names(path, file).get(theirs.get("label", ""))
    number = 0
    if file.metadata.num_rows > container.size:
        raise UserError(f"{path} tells of {file.metadata.num_rows} rows in {container.size} bytes", _AGAIN)
    for group in range(file.num_row_groups):
        said_there = _rows(path, file, group, spoken) if spoken else None
        filled = {name: _filled(path, file, group, theirs[name]) for name in held}
        for row in range(file.metadata.row_group(group).num_rows):
            where = f"{path}, row {number}"
            record = {ours[name]: value for name, value in said_there[row].items()} if said_there else {}
            if classes is not None:
                record["label"] = class_name(classes, record.get("label"), where)
            files: dict[str, File | None] = {}
            for name in (column, "mask"):
                if name in held:
                    files[name] = Cell(container, group, row, theirs[name]) if filled[name][row] else None
                else:
                    place = text_of(record, name, where)
                    files[name] = _place(path, place, where) if place else None
            image = files[column]
            if image is None:
                raise UserError(f"{where} holds no image", "Leave the row out.")
            name = f"row {number:08d}" if column in held else str(record[column])
            yield name, image, files["mask"], fields_of(said(record, where))
            number += 1


def _example(path: Path, prefix: str, name: str, file: File, mask: File | None, fields: Any) -> FileExample:
    return FileExample(prefix + name, path=file, mask=mask, **fields)


def _ours(path: Path, columns: list[str], wanted: Wanted) -> dict[str, str]:
    """Our name of every column."""
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise UserError(f"{path} has two columns named '{twice[0]}'", "Rename one of them.")
    ours = rename(columns, wanted.columns, str(path))
    refuse_synonyms(str(path), set(ours.values()))
    return ours


def _image_column(path: Path, columns: Collection[str]) -> str:
    """ "image" or "file_name", whichever the table has."""
    there = [name for name in ("image", "file_name") if name in columns]
    if len(there) == 1:
        return there[0]
    listed = ", ".join(columns)
    if there:
        raise UserError(
            f"{path} has both an image and a file_name column", f"Drop one of the two. Its columns: {listed}"
        )
    guess = nearest("image", columns) or nearest("file_name", columns) or "NAME"
    raise UserError(
        f"{path} has no column image (paths or bytes) or file_name (paths); its columns: {listed}",
        f"Rename the column of the images, or add --columns image {guess}.",
    )


def _place(path: Path, name: str, where: str) -> Path:
    """A file that a table names: an absolute path as it is, any other below the table's folder."""
    if ".." in Path(name).parts:
        raise UserError(
            f"{where}: {name} leads out of the folder", "Write the absolute path if that is meant."
        )
    return path.parent / name


def _check_files(data: str, examples: list[FileExample], root: Path) -> list[str]:
    """Notes on files outside the table's folder.

    Raises:
        UserError: a file is not there.
    """
    files = [file for example in examples for file in (example.path, example.mask) if isinstance(file, Path)]
    absent = [str(file) for file in files if not file.is_file()]
    if absent:
        raise UserError(
            f"{data} names {len(absent)} files that are not there: {few(absent)}",
            "Paths are absolute or relative to the folder of the table.",
        )
    outside = [str(file) for file in files if not file.absolute().is_relative_to(root)]
    return [f"{len(outside)} files lie outside {root}: {few(outside)}"] if outside else []


# ---- parquet -----------------------------------------------------------------------------------------


def _parquet_files(folder: Path) -> list[Path]:
    """The parquet files of a folder, or of its subfolder data, where it holds no images: as on the hub."""
    files = [*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]
    if files and any(file.suffix.lower() in SUFFIXES for file in folder.iterdir()):
        return []
    return sorted(files)


def _refuse_parts(data: str, paths: list[Path]) -> None:
    """Parts of one data set (train-00000-of-00002.parquet, test-...) are not to be mixed."""
    parts = {part: path for path in paths for part in _PARTS if re.match(rf"{part}[-_.]", path.name)}
    if len(parts) > 1:
        best = parts.get("train") or next(iter(parts.values()))
        part = re.split(r"[-_.]", best.name)[0]
        raise UserError(
            f"{data} holds the parts {', '.join(parts)} of one data set",
            f"Give one of them: '{best.parent / part}*.parquet'",
        )


def _parquet(path: Path) -> Any:
    """An open ``pyarrow.parquet.ParquetFile``.

    Raises:
        UserError: pyarrow is missing; the file is not there or broken.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path} cannot be read: pyarrow is not installed", 'pip install "latentflow[parquet]"'
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER)
        file.schema_arrow  # noqa: B018 (made, and refused, when it is asked for)
    except _failures() as error:
        raise UserError(f"{path} is no intact parquet file: {reason(error)}", _AGAIN) from None
    return file


def _failures() -> tuple[type[BaseException], ...]:
    """Return what pyarrow raises on a damaged file."""
    import pyarrow

    return (
        pyarrow.ArrowException, OSError, MemoryError, ValueError, OverflowError, NotImplementedError, LookupError
    )  # fmt: skip


def _group(path: Path, file: Any, group: int, columns: list[str]) -> Any:
    """Read some columns of a group of rows: an Arrow table.

    Raises:
        UserError: a page is damaged; a column would unpack to far more than it takes in the file.
    """
    _refuse_bomb(path, file, group)
    with reading(path, *_failures(), fix=_AGAIN):
        table = file.read_row_group(group, columns=columns)
        table.validate(full=True)
    rows = file.metadata.row_group(group).num_rows
    if table.num_rows != rows:
        raise UserError(f"{path} holds {table.num_rows} rows in group {group}, not {rows}", _AGAIN)
    return table


def _refuse_bomb(path: Path, file: Any, group: int) -> None:
    unpacked = file.metadata.row_group(group).total_byte_size
    if unpacked > MOST_UNPACKED * path.stat().st_size:
        refuse_large(f"{path}: group {group}", unpacked, IMAGE_BYTES)


def _rows(path: Path, file: Any, group: int, columns: list[str]) -> list[dict[str, Any]]:
    """Read some columns of a group of rows: a dict for each row."""
    table = _group(path, file, group, columns)
    with reading(path, *_failures(), fix=_AGAIN):
        rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _holds_bytes(file: Any, column: str) -> bool:
    """Whether a column holds the bytes of images, bare or in a struct (bytes, path) as `datasets` writes them."""
    import pyarrow.types as types

    kind = file.schema_arrow.field(column).type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _filled(path: Path, file: Any, group: int, column: str) -> list[bool]:
    """Which cells of a column of bytes hold any; where the file counts the empty ones and there are none, unread."""
    import pyarrow.types as types

    told = file.metadata.row_group(group)
    _refuse_bomb(path, file, group)
    with reading(path, *_failures(), fix=_AGAIN):
        # Asking for damaged statistics would end the process; reading a row first is refused as an error.
        next(file.iter_batches(batch_size=1, row_groups=[group], columns=[column]), None)
        names = [file.schema.column(leaf).path for leaf in range(len(file.schema))]
        for leaf, name in enumerate(names):
            counts = told.column(leaf).statistics if name in (column, f"{column}.bytes") else None
            if counts is not None and counts.has_null_count and counts.null_count == 0:
                return [True] * int(told.num_rows)

    values = _group(path, file, group, [column]).column(column).combine_chunks()
    if types.is_struct(values.type):
        values = values.field("bytes")
    return [bool(filled) for filled in values.is_valid().to_pylist()]


def _class_names(path: Path, file: Any) -> dict[str, list[str]]:
    """Names of classes by column, where `datasets` has written them into the file.

    Raises:
        UserError: it has not written what is there.
    """
    raw = (file.schema_arrow.metadata or {}).get(b"huggingface")
    if raw is None:
        return {}
    where, fix = (
        f"the metadata 'huggingface' of {path}",
        "Write the table again, with `datasets` or without them.",
    )
    told = parse_json(decode(raw, where), where, fix)
    for name in ("info", "features"):
        told = {} if told is None else told
        if not isinstance(told, Mapping):
            raise UserError(f"{where} hold {shown(told)} where {name} should be", fix)
        told = told.get(name)
    if not isinstance(told or {}, Mapping):
        raise UserError(f"{where}: features is {shown(told)}, not an object", fix)
    classes = {}
    for name, one in (told or {}).items():
        if isinstance(one, Mapping) and "names" in one:
            names = one["names"]
            if not isinstance(names, list) or not all(isinstance(word, str) for word in names):
                raise UserError(
                    f"{where}: the names of {name} are {shown(names)}, not a list of strings", fix
                )
            classes[name] = names
    return classes


@functools.lru_cache(maxsize=2)
def _column(table: Container, group: int, column: str, process: int) -> Any:
    """One column of one group of rows; the last ones are kept, as rows are mostly read in order."""
    return _group(table.path, _parquet(table.path), group, [column]).column(column)
