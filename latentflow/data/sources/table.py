"""CSV, TSV and parquet tables: a row for each image, with its path or (parquet) its bytes."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError, few, nearest, plural, reading, shown
from ...utils.files import decode, parse_json
from ...utils.names import near_path
from ..dataset import FileExample, Source
from .annotations import (
    COLUMNS,
    IMAGE_COLUMNS,
    DataRequest,
    holds_captions,
    our_columns,
    source_of_rows,
    table_examples,
    unused_columns,
)
from .files import (
    IMAGE_BYTES,
    Container,
    Member,
    common_folder,
    import_optional,
    intact,
    many_paths,
    parquet_files,
    refuse_large,
)
from .records import CSV_SUFFIXES, read_records

_PARTS = ("train", "test", "validation", "valid", "val", "dev")
_LOCK = threading.Lock()
# Times the size of a parquet file that a group of rows may unpack to, where that is more than ``IMAGE_BYTES``.
MOST_UNPACKED = 100
_BUFFER = 2**16  # bytes that are read ahead; without, a row is read with all of its column in the group
_AGAIN = "Copy or download it again."

_Rows = Iterator[tuple[str, Mapping[str, object], Mapping[str, Member | None]]]  # see ``table_examples``


def read_table(data: str, request: DataRequest) -> Source:
    """Return the rows of one CSV or TSV file, or of parquet files of the same columns.

    Paths are relative to the table's folder; absolute paths may lead anywhere, and the notes count them.

    Raises:
        UserError: a file is broken or missing; there is no column of images, or one of bytes and one of paths; an
            image is listed twice or does not exist; captions or classes are missing.
    """
    folder = Path(data).expanduser()
    paths = parquet_files(folder) if folder.is_dir() else many_paths(data)
    _refuse_parts(data, paths)
    root, unused = common_folder(paths), dict[str, None]()
    examples: list[FileExample] = []
    for path in paths:
        found = _table(path, request, unused)
        if len(paths) > 1:
            prefix = path.absolute().relative_to(root).with_suffix("").as_posix()
            found = [dataclasses.replace(example, name=f"{prefix}/{example.name}") for example in found]
        examples += found
    notes = [f"{plural(len(examples), 'row')} of {few([path.name for path in paths])}"]
    files = [
        file
        for example in examples
        for file in (example.path, example.mask, *(file for _, file in example.controls))
        if isinstance(file, Path)
    ]
    if absent := [file for file in files if not file.is_file()]:
        start = paths[0].parent
        first = absent[0].relative_to(start) if absent[0].is_relative_to(start) else absent[0]
        raise UserError(
            f"{data} names {plural(len(absent), 'file')} that cannot be found: {few(absent)}",
            f"{near_path(str(first), start)}Paths are absolute or relative to the folder of the table.",
        )
    if outside := [str(file) for file in files if not file.absolute().is_relative_to(root)]:
        notes.append(f"{plural(len(outside), 'file')} outside {root}: {few(outside)}")
    if unused:
        notes.append(f"columns not used: {few(unused)}")
    lacks = "a column text or label"
    return source_of_rows(data, examples, request, lacks, notes, folder if folder.is_dir() else None)


def _table(path: Path, request: DataRequest, unused: dict[str, None]) -> list[FileExample]:
    """Return the rows of one file; add the names of the columns that are not read to ``unused``."""
    if path.suffix.lower() in CSV_SUFFIXES:
        records = list(read_records(path, path, request.columns.values()))
        if not records:
            return []
        ours, classes = our_columns(records[0][1], request.columns, str(path)), None
        ours = request.used_columns(ours)
        rows: _Rows = ((f"{path}, line {line}", _stripped(record), {}) for line, record in records)
    else:
        file = _open_parquet(path)
        ours = request.used_columns(our_columns(file.schema_arrow.names, request.columns, str(path)))
        label = next((theirs for theirs, name in ours.items() if name == "label"), "")
        classes = _class_names(path, file).get(label)
        rows = _parquet_rows(path, file, ours)
    image = _image_column(path, ours.values())
    unused |= dict.fromkeys(unused_columns(ours, image))
    return list(table_examples(rows, ours, image, path.parent, classes, request.control_columns))


def _image_column(path: Path, columns: Collection[str]) -> str:
    """Return "image" or "file_name", whichever the table has."""
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


def _stripped(record: Mapping[str, object]) -> dict[str, object]:
    return {name: value.strip() if isinstance(value, str) else value for name, value in record.items()}


# ---------------------------------------------------------------- parquet


@dataclass(frozen=True, slots=True)
class Cell(Member):
    """The bytes in one cell of a parquet file."""

    table: Container
    group: int  # of rows
    row: int  # in the group
    column: str

    def _read(self, bound: int) -> bytes:
        self.table.check()
        with _LOCK:  # else every thread would read the same group
            values = _read_column(self.table, self.group, self.column, os.getpid())
        value = values[self.row].as_py()
        content: bytes | None = value["bytes"] if isinstance(value, Mapping) else value
        if content is None:
            raise UserError(f"{self} holds no image", _AGAIN)
        return content

    def __str__(self) -> str:
        return f"{self.table.path}: {self.column} of row {self.row} in group {self.group}"


@functools.lru_cache(maxsize=2)
def _read_column(table: Container, group: int, column: str, process: int) -> Any:
    """Return one column of one group of rows; the last ones are kept, as rows are mostly read in order."""
    return _read_group(table.path, _open_parquet(table.path), group, [column]).column(column)


def _parquet_rows(path: Path, file: Any, ours: Mapping[str, str]) -> _Rows:
    """Yield every row without its images: only annotations and paths are read, and which cells hold bytes."""
    container = Container.of(path)
    if file.metadata.num_rows > container.size:
        raise UserError(f"{path} claims {file.metadata.num_rows} rows in {container.size} bytes", _AGAIN)
    cells = {
        name: theirs for theirs, name in ours.items() if name in IMAGE_COLUMNS and _holds_bytes(file, theirs)
    }
    read = [
        theirs
        for theirs, name in ours.items()
        if name not in cells and (name in COLUMNS or holds_captions(name))
    ]
    number = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        filled = {name: _filled(path, file, group, theirs) for name, theirs in cells.items()}
        rows: list[dict[str, Any]] = [{}] * size
        if read:
            table = _read_group(path, file, group, read)
            with reading(path, *_failures(), fix=_AGAIN):
                rows = table.to_pylist()
        for row, values in enumerate(rows):
            members = {
                name: Cell(container, group, row, theirs) if filled[name][row] else None
                for name, theirs in cells.items()
            }
            yield f"{path}, row {number}", values, members
            number += 1


def _refuse_parts(data: str, paths: list[Path]) -> None:
    """Refuse to mix the parts of one data set (train-00000-of-00002.parquet, test-...)."""
    parts = {part: path for path in paths for part in _PARTS if re.match(rf"{part}[-_.]", path.name)}
    if len(parts) > 1:
        best = parts.get("train") or next(iter(parts.values()))
        part = re.split(r"[-_.]", best.name)[0]
        raise UserError(
            f"{data} holds the parts {', '.join(parts)} of one data set",
            f"Give one of them: '{best.parent / part}*.parquet'",
        )


def _open_parquet(path: Path) -> Any:
    """Return an open ``pyarrow.parquet.ParquetFile``.

    Raises:
        UserError: pyarrow is missing; the file is missing or broken.
    """
    parquet = import_optional("pyarrow.parquet", str(path))
    with intact(path, "parquet", *_failures()):
        file = parquet.ParquetFile(path, buffer_size=_BUFFER)
        file.schema_arrow  # noqa: B018 (made, and refused, when it is asked for)
    return file


def _failures() -> tuple[type[BaseException], ...]:
    """Return what pyarrow raises on a damaged file."""
    import pyarrow

    return (
        pyarrow.ArrowException, OSError, MemoryError, ValueError, OverflowError, NotImplementedError, LookupError
    )  # fmt: skip


def _read_group(path: Path, file: Any, group: int, columns: list[str]) -> Any:
    """Return some columns of a group of rows as an Arrow table.

    Raises:
        UserError: a page is damaged; the group would unpack to far more than it takes in the file.
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


def _holds_bytes(file: Any, column: str) -> bool:
    """Return whether a column holds bytes, bare or in a struct (bytes, path) as `datasets` writes them."""
    import pyarrow.types as types

    kind = file.schema_arrow.field(column).type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _filled(path: Path, file: Any, group: int, column: str) -> list[bool]:
    """Return which cells of a column hold bytes; it is not read where the file's statistics count no empty one."""
    import pyarrow.types as types

    metadata = file.metadata.row_group(group)
    _refuse_bomb(path, file, group)
    with reading(path, *_failures(), fix=_AGAIN):
        # Asking for damaged statistics would end the process; reading a row first is refused as an error.
        next(file.iter_batches(batch_size=1, row_groups=[group], columns=[column]), None)
        names = [file.schema.column(leaf).path for leaf in range(len(file.schema))]
        for leaf, name in enumerate(names):
            counts = metadata.column(leaf).statistics if name in (column, f"{column}.bytes") else None
            if counts is not None and counts.has_null_count and counts.null_count == 0:
                return [True] * int(metadata.num_rows)
    values = _read_group(path, file, group, [column]).column(column).combine_chunks()
    if types.is_struct(values.type):
        values = values.field("bytes")
    return [bool(filled) for filled in values.is_valid().to_pylist()]


def _class_names(path: Path, file: Any) -> dict[str, list[str]]:
    """Return the names of classes by column, where `datasets` has written them into the file.

    Raises:
        UserError: something else stands there.
    """
    raw = (file.schema_arrow.metadata or {}).get(b"huggingface")
    if raw is None:
        return {}
    where, fix = (
        f"the metadata 'huggingface' of {path}",
        "Write the table again, with `datasets` or without them.",
    )
    features = parse_json(decode(raw, where), where, fix)
    for name in ("info", "features"):
        features = {} if features is None else features
        if not isinstance(features, Mapping):
            raise UserError(f"{where} hold {shown(features)} where {name} should be", fix)
        features = features.get(name)
    if not isinstance(features or {}, Mapping):
        raise UserError(f"{where}: features is {shown(features)}, not an object", fix)
    classes = {}
    for column, feature in (features or {}).items():
        if isinstance(feature, Mapping) and "names" in feature:
            names = feature["names"]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise UserError(
                    f"{where}: the names of {column} are {shown(names)}, not a list of strings", fix
                )
            classes[column] = names
    return classes
