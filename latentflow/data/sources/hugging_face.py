"""Data sets of the Hugging Face library `datasets`: saved to disk, or from the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

from ...config import Control
from ...errors import UserError, plural, reading
from ..dataset import Source
from .annotations import (
    COLUMNS,
    IMAGE_COLUMNS,
    DataRequest,
    holds_captions,
    lower_case,
    rename,
    source_of_rows,
    table_examples,
)
from .files import Member, import_optional, read_bytes

# Names that columns have on the hub, the likeliest first, looked for where no column has our name; those of control
# images where these are asked for.
_LIKELY: dict[str, tuple[str, ...]] = {
    "image": ("img", "picture", "images", "pixel_values"),
    "text": ("caption", "captions", "prompt", "texts", "description"),
    "label": ("labels", "class", "fine_label", "category"),
    "mask": (),
}
_LIKELY_CONTROL: dict[Control, str] = {"image": "conditioning_image", "labels": "segmentation_mask"}
_AGAIN = "Save it again with save_to_disk."
_HUB = re.compile(r"hub:(?P<name>[^:]+/[^:]+)(:(?P<part>.+))?")


@dataclass(frozen=True, slots=True)
class ArrowMember(Member):
    """An image in a row of a data set, which is mapped from disk."""

    fingerprint: str  # of the data set's content
    row: int
    column: str
    rows: Any = field(compare=False, repr=False)

    def _read(self, bound: int) -> bytes:
        with reading(self, *_failures(), fix=_AGAIN):
            value = self.rows[self.row][self.column]
        content: bytes | None = value["bytes"] if value is not None else None
        if content is None and (value is None or value["path"] is None):
            raise UserError(f"{self} holds no image", "Leave the row out.")
        return read_bytes(Path(value["path"]), bound) if content is None else content

    def __str__(self) -> str:
        return f"{self.column} of row {self.row}"


def read_saved(data: str, request: DataRequest) -> Source:
    """Return the rows of a data set in a folder; it is mapped, not loaded.

    Raises:
        UserError: `datasets` is missing; the folder is damaged or holds several parts; there is no column of
            images (the columns are listed); captions or classes are missing.
    """
    path = Path(data).expanduser()
    library = import_optional("datasets", data)
    with reading(data, *_failures(), fix=_AGAIN):
        loaded = library.load_from_disk(str(path))
    if isinstance(loaded, Mapping):
        if len(loaded) != 1:
            best = "train" if "train" in loaded else next(iter(loaded))
            raise UserError(f"{data} holds the parts {', '.join(loaded)}", f"Give one of them: {path / best}")
        loaded = next(iter(loaded.values()))
    return _source(data, loaded, request, path)


def read_hub(data: str, request: DataRequest) -> Source:
    """Return the rows of `hub:owner/name` or `hub:owner/name:split`, downloaded into the library's own cache.

    Raises:
        UserError: as for ``read_saved``; there is no such set or split, or no network.
    """
    match = _HUB.fullmatch(data)
    if match is None:
        raise UserError(
            f"'{data}' is not the name of a data set on the hub",
            "Write hub:owner/name or hub:owner/name:split.",
        )
    library = import_optional("datasets", data)
    try:
        loaded = library.load_dataset(match["name"], split=match["part"] or "train")
    except Exception as error:  # of the library, its file systems and the network, with no common class
        lines = str(error).strip().splitlines()
        raise UserError(
            f"{data} cannot be loaded: {lines[0] if lines else type(error).__name__}",
            "Check the name, the split and the network; sets that need a script are not run.",
        ) from error
    return _source(data, loaded, request, None)


def _source(data: str, rows: Any, request: DataRequest, root: Path | None) -> Source:
    import datasets

    ours, notes = _columns(data, rows.features, request)
    images = {name: theirs for theirs, name in ours.items() if name in IMAGE_COLUMNS}
    annotations = [theirs for theirs in ours if theirs not in images.values()]
    label = next((theirs for theirs, name in ours.items() if name == "label"), "")
    with reading(data, *_failures(), fix=_AGAIN):
        rows.data.validate(full=True)  # offsets of a damaged file would lead out of the memory
        rows = rows.with_format(None)  # all columns as plain values, however it was saved
        undecoded = rows.select_columns(list(images.values()))
        for theirs in images.values():
            undecoded = undecoded.cast_column(theirs, datasets.Image(decode=False))
        annotated = rows.select_columns(annotations)
    values = _each(data, annotated) if annotations else repeat({}, rows.num_rows)
    found = (
        (
            f"{data}, row {row}",
            value,
            {name: ArrowMember(rows._fingerprint, row, theirs, undecoded) for name, theirs in images.items()},
        )
        for row, value in enumerate(values)
    )
    class_names = getattr(rows.features.get(label), "names", None)
    examples = list(table_examples(found, ours, class_names=class_names, controls=request.control_columns))
    notes = [f"{plural(len(examples), 'row')}, mapped from disk", *notes]
    return source_of_rows(data, examples, request, "a column text or label", notes, root)


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


def _columns(
    data: str, features: Mapping[str, Any], request: DataRequest
) -> tuple[dict[str, str], list[str]]:
    """Return our name of every column that is used, by its own, and notes on what was inferred or is not used.

    Raises:
        UserError: no column, or more than one, may hold the images.
    """
    ours = request.used_columns(rename(features, request.columns, data))
    images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    words = {lower_case(name): name for name in sorted(features)}  # of two spellings the one in lower case
    inferred = []
    led = {f"control_{kind}": (_LIKELY_CONTROL[kind],) for kind in request.control}
    led = {} if "control" in request.control_columns and "control" in ours.values() else led
    for meaning, likely in (_LIKELY | led).items():
        if meaning in ours.values() or (meaning == "text" and any(map(holds_captions, ours.values()))):
            continue
        there = (words[word] for word in (meaning, *likely) if word in words)
        chosen = next((name for name in there if ours[name] == name), None)
        if meaning == "image" and len(images) == 1:
            chosen = images[0]
        if chosen is not None and (meaning in ("text", "label") or chosen in images):
            ours[chosen] = meaning
            inferred.append(f"{meaning} from '{chosen}'")
    chosen_images = [theirs for theirs, name in ours.items() if name in IMAGE_COLUMNS]
    if "image" not in ours.values() or any(theirs not in images for theirs in chosen_images):
        listed = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        raise UserError(
            f"{data} has not exactly one column of images; its columns: {listed}",
            f"Say which: --columns image {images[0] if images else 'NAME'}",
        )
    used = {
        theirs: name
        for theirs, name in ours.items()
        if name != "file_name" and (name in COLUMNS or holds_captions(name))
    }
    unused = [name for name in features if name not in used]
    notes = ["inferred: " + ", ".join(inferred) + " (--columns decides)"] if inferred else []
    notes += ["columns not used: " + ", ".join(unused)] if unused else []
    for kind, likely_control in _LIKELY_CONTROL.items():
        for name in (name for name in unused if lower_case(name) == likely_control and name in images):
            notes.append(f"{name}: --control {kind} draws by it; if it is a mask: --columns mask {name}")
    return used, notes


def _failures() -> tuple[type[BaseException], ...]:
    """Return what `datasets` raises on damaged files, of which it checks little."""
    import pyarrow

    return (
        pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError,
        NotImplementedError,
    )  # fmt: skip
