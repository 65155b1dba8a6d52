"""The files of a folder of latents: their names, and what latents.json and index.arrow must hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from ...errors import UserError, shown
from ...utils.files import read_json, storable
from ..dataset import Kind

VERSION = 1  # of the format
DESCRIPTION, INDEX, AUTOENCODER = "latents.json", "index.arrow", "autoencoder"


def read_description(folder: Path) -> dict[str, Any]:
    """Return what ``latents.json`` says.

    Raises:
        UserError: it cannot be read, is of another version, or holds not what ``describe`` in precomputing.py writes.
    """
    file, fix = folder / DESCRIPTION, "Precompute into another folder."
    description = read_json(file, fix)
    version = description.get("version") if isinstance(description, dict) else None
    if isinstance(version, int) and version != VERSION:
        raise UserError(
            f"{folder} was written in version {version} of its format, this is {VERSION}",
            "Update latentflow, or precompute again into another folder.",
        )
    for name, is_right in _RIGHT.items():
        held = description.get(name) if isinstance(description, dict) else None
        if not is_right(held):
            raise UserError(f"{file} is damaged: {name} is {shown(held)}", fix)
    places = [place_of(kind, size) for size in description["sizes"] for kind in _KINDS]
    for name in description["tables"]:
        if name not in places:
            raise UserError(f"{file} is damaged: it tells of {name!r} and of no such size", fix)
    found: dict[str, Any] = description
    return found


def _is_whole(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_text(value: object) -> bool:
    return isinstance(value, str) and storable(value) == value


def _are(is_right: Callable[[Any], bool], value: object, length: int | None = None) -> bool:
    return isinstance(value, list) and length in (None, len(value)) and all(map(is_right, value))


def _is_size(value: object) -> bool:
    return _are(lambda side: _is_whole(side, 1), value, 2)


def _are_tables(value: object) -> bool:
    """Return whether these are settings of tables, those of latents with what `LatentFolder` reads of them."""
    if not isinstance(value, dict) or not all(isinstance(made, dict) for made in value.values()):
        return False
    latents = [made for place, made in value.items() if kind_of(place) == "latents"]
    return bool(latents) and all(
        isinstance(made.get("flips"), bool)
        and _are(lambda level: _is_whole(level) and level < 256, made.get("background"), 3)
        for made in latents
    )


_KINDS = ("latents", "pixels", "masks")
# What every entry of ``latents.json`` must be.
_RIGHT: dict[str, Callable[[Any], bool]] = {
    "version": lambda value: value == VERSION,
    "complete": lambda value: isinstance(value, bool),
    "name": _is_text,
    "pictures": _is_whole,
    "kind": lambda value: value in get_args(Kind),
    "classes": partial(_are, _is_text),
    "notes": partial(_are, _is_text),
    "resolution": lambda value: _is_whole(value, 1),
    "sizes": partial(_are, _is_size),
    "tables": _are_tables,
    "given": _is_text,
    "index": _is_text,
}


def setting_differences(held: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Return in which settings ``wanted`` a table was made otherwise; "" where in none."""
    differ = [name for name in wanted if wanted[name] != held.get(name)]
    return "; ".join(f"{name} {held.get(name)}, not {wanted[name]}" for name in differ)


def index_schema(*, pixel_keys: bool) -> Any:
    """Return the columns of ``index.arrow``, which has a row for each image.

    Args:
        pixel_keys: whether it has a column of them; without one they are the keys, as in folders from before colours
            were converted. A run knows its data by the hash of this file.
    """
    arrow = import_arrow()
    schema = arrow.schema(
        [
            ("name", arrow.string()),
            ("texts", arrow.list_(arrow.string())),
            ("label", arrow.string()),
            ("class_id", arrow.int32()),
            ("weight", arrow.float32()),
            ("repeats", arrow.int32()),
            ("key", arrow.string()),
            ("pixel_key", arrow.string()),
            ("mask_key", arrow.string()),
            ("group", arrow.int64()),
            ("bucket", arrow.int32()),
            ("height", arrow.int32()),
            ("width", arrow.int32()),
        ]
    )
    return schema if pixel_keys else schema.remove(schema.get_field_index("pixel_key"))


def place_of(kind: str, size: Sequence[int]) -> str:
    """Return the folder of the shards of ``kind`` of images of (height, width) ``size``."""
    height, width = size
    return kind if height == width else f"{kind}-{height}x{width}"


def kind_of(place: str) -> str:
    """Return what the shards of a folder hold: "latents", "pixels" or "masks"."""
    return place.split("-")[0]


def import_arrow() -> Any:
    """Return pyarrow with its ``ipc``; UserError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise UserError(
            "folders of latents need pyarrow, which is not installed", 'pip install "latentflow[parquet]"'
        ) from None
    return pyarrow
