"""Data sets of the Hugging Face library `datasets`: saved to disk, or of the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

from ...errors import UserError, reading
from ..dataset import FileExample, Source
from .annotations import KNOWN, class_name, is_text, rename, said
from .assemble import Wanted, decide, fields_of, masked, source_of
from .members import File, Member, read_bytes

# Names that columns go by on the hub, the likeliest first, where none has our name.
_LIKELY = {
    "image": ("img", "picture", "images", "pixel_values"),
    "text": ("caption", "captions", "prompt", "texts", "description"),
    "label": ("labels", "class", "fine_label", "category"),
    "mask": ("segmentation_mask", "conditioning_image"),
}
_AGAIN = "Save it again with save_to_disk."
_HUB = re.compile(r"hub:(?P<name>[^:]+/[^:]+)(:(?P<part>.+))?")


@dataclass(frozen=True, slots=True)
class ArrowMember(Member):
    """An image in a row of a data set, which is mapped from disk."""

    fingerprint: str  # of the data set, which tells its content
    row: int
    column: str
    rows: Any = field(compare=False, repr=False)

    def _read(self, bound: int) -> bytes:
        with reading(self, *_failures(), fix=_AGAIN):
            value = self.rows[self.row][self.column]
        held: bytes | None = value["bytes"] if value is not None else None
        if held is None and (value is None or value["path"] is None):
            raise UserError(f"{self} holds no image", "Leave the row out.")
        return read_bytes(Path(value["path"]), bound) if held is None else held

    def __str__(self) -> str:
        return f"{self.column} of row {self.row}"


def is_saved(data: str) -> bool:
    """Whether DATA is a folder that `save_to_disk` wrote."""
    path = Path(data).expanduser()
    return (path / "dataset_dict.json").is_file() or all(
        (path / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def is_hub(data: str) -> bool:
    """Whether DATA asks for the hub in so many words."""
    return data.startswith("hub:")


def read_saved(data: str, wanted: Wanted) -> Source:
    """The rows of a data set in a folder; it is mapped, not loaded.

    Raises:
        UserError: `datasets` is missing; the folder is damaged or holds several parts; there is no column of
            images (the columns are listed); captions or classes are missing.
    """
    path = Path(data).expanduser()
    library = _library()
    with reading(data, *_failures(), fix=_AGAIN):
        loaded = library.load_from_disk(str(path))
    if isinstance(loaded, Mapping):
        if len(loaded) != 1:
            best = "train" if "train" in loaded else next(iter(loaded))
            raise UserError(f"{data} holds the parts {', '.join(loaded)}", f"Give one of them: {path / best}")
        loaded = next(iter(loaded.values()))
    return _source(data, loaded, wanted, path)


def read_hub(data: str, wanted: Wanted) -> Source:
    """The rows of `hub:owner/name` or `hub:owner/name:split`, downloaded into the library's own cache.

    Raises:
        UserError: as for ``read_saved``; there is no such set or split, or no network.
    """
    match = _HUB.fullmatch(data)
    if match is None:
        raise UserError(
            f"'{data}' names no data set of the hub", "Write hub:owner/name or hub:owner/name:split."
        )
    library = _library()
    try:
        loaded = library.load_dataset(match["name"], split=match["part"] or "train")
    except Exception as error:  # of the library, its file systems and the network, with no common class
        what = str(error).strip().splitlines()
        raise UserError(
            f"{data} cannot be loaded: {what[0] if what else type(error).__name__}",
            "Check the name, the split and the network; sets that need a script are not run.",
        ) from error
    return _source(data, loaded, wanted, None)


def _source(data: str, rows: Any, wanted: Wanted, root: Path | None) -> Source:
    ours, notes = _columns(data, rows.features, wanted)
    theirs = {name: column for column, name in ours.items()}
    if rows.num_rows == 0:
        raise UserError(f"{data} has no rows", "Give a data set with images.")
    with reading(data, *_failures(), fix=_AGAIN):
        rows.data.validate(full=True)  # offsets of a damaged file would lead out of the memory
        rows = rows.with_format(None)  # all columns as plain values, however it was saved
    examples = list(_examples(data, rows, theirs))
    kind, more = decide(examples, wanted.condition, data, "a column text or label")
    examples, told = masked(examples, wanted.masks)
    notes = [f"{len(examples)} rows, mapped from disk", *notes, *more, *told]
    return source_of(data, examples, kind, wanted, notes, root)


def _examples(data: str, rows: Any, theirs: Mapping[str, str]) -> Iterator[FileExample]:
    import datasets

    images = {name: theirs[name] for name in ("image", "mask") if name in theirs}
    spoken = [name for name in theirs if name not in images]
    with reading(data, *_failures(), fix=_AGAIN):
        undecoded = rows.select_columns(list(images.values()))
        for column in images.values():
            undecoded = undecoded.cast_column(column, datasets.Image(decode=False))
        told = rows.select_columns([theirs[name] for name in spoken])
    names = getattr(rows.features.get(theirs.get("label", "")), "names", None)
    for row, values in enumerate(_each(data, told) if spoken else repeat({}, rows.num_rows)):
        record = {name: values[theirs[name]] for name in spoken}
        if names is not None:
            record["label"] = class_name(names, record.get("label"), f"{data}, row {row}")
        places: dict[str, File] = {
            name: ArrowMember(rows._fingerprint, row, column, undecoded) for name, column in images.items()
        }
        fields = fields_of(said(record, f"{data}, row {row}"))
        yield FileExample(f"row {row:08d}", path=places["image"], mask=places.get("mask"), **fields)


def _each(data: str, rows: Any) -> Iterator[Any]:
    """Yield every row.

    Raises:
        UserError: one cannot be read.
    """
    left = iter(rows)
    while True:
        with reading(data, *_failures(), fix=_AGAIN):
            values = next(left, None)
        if values is None:
            return
        yield values


def _columns(data: str, features: Mapping[str, Any], wanted: Wanted) -> tuple[dict[str, str], list[str]]:
    """Our name of every column that is used, by its own, and a note on what was inferred.

    Raises:
        UserError: no column, or more than one, may hold the images.
    """
    ours = rename(features, wanted.columns, data)
    listed = ", ".join(f"{name} ({type(one).__name__})" for name, one in features.items())
    inferred = []
    images = [name for name, one in features.items() if type(one).__name__ == "Image"]
    for meaning, likely in _LIKELY.items():
        if meaning in ours.values() or (meaning == "text" and any(map(is_text, ours.values()))):
            continue
        chosen = next((name for name in likely if name in features and ours[name] == name), None)
        if meaning == "image" and len(images) == 1:
            chosen = images[0]
        if chosen is not None and (meaning in ("text", "label") or chosen in images):
            ours[chosen] = meaning
            inferred.append(f"{meaning} from '{chosen}'")
    held = [name for name in ours if ours[name] in ("image", "mask")]
    if "image" not in ours.values() or any(name not in images for name in held):
        guess = images[0] if images else "NAME"
        raise UserError(
            f"{data} has no one column of images; its columns: {listed}",
            f"Say which: --columns image {guess}",
        )
    used = {name: mine for name, mine in ours.items() if mine in KNOWN or is_text(mine)}
    used = {name: mine for name, mine in used.items() if mine != "file_name"}
    unused = [name for name in features if name not in used]
    notes = ["inferred: " + ", ".join(inferred) + " (--columns decides)"] if inferred else []
    return used, notes + (["columns not used: " + ", ".join(unused)] if unused else [])


def _failures() -> tuple[type[BaseException], ...]:
    """Return what `datasets` raises on damaged files: it checks little of what they say."""
    import pyarrow

    return (
        pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError,
        NotImplementedError,
    )  # fmt: skip


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "this kind of data needs the library datasets", 'pip install "latentflow[datasets]"'
        ) from None
    return datasets
