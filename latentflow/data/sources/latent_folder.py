"""A folder of latents that `latentflow precompute` wrote: a source to train from, without the images.

    latents.json     what it holds and how that was made
    index.arrow      a row for each image: name, captions, class, weight, sizes, keys (Arrow's file format)
    autoencoder/     the autoencoder that encoded them
    latents/, pixels/, masks/    shards of squares; of another size in latents-48x80/ (height x width) and so on

The index is mapped, so an image costs no memory until it is asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from ...config import DataConfig
from ...errors import UserError, plural, reading, shown
from ...utils.files import read_json, storable
from ...utils.names import as_spelled
from ..cache.store import NO_KEY, Array, ShardSet, digests
from ..dataset import NO_CLASS, Example, Kind, Source, StoredSizes, top_folder
from .annotations import DataRequest
from .files import hash_stream, import_optional

VERSION = 1  # of the format
DESCRIPTION, INDEX, AUTOENCODER = "latents.json", "index.arrow", "autoencoder"


def read_latent_folder(data: str, request: DataRequest) -> LatentFolder:
    """Open a folder of latents. Condition and masks were decided when it was made; "none" does without.

    Raises:
        UserError: it is not complete, was written by another version, or does not hold what is asked for.
    """
    request.refuse_control("folders of latents")
    folder = Path(data).expanduser()
    description = read_description(folder)
    if not description["complete"]:
        raise UserError(
            f"{folder} is not complete: `latentflow precompute` was stopped",
            "Start the line that made it again: it goes on where it stopped.",
        )
    if request.masks == "none":
        tables = description["tables"].items()
        description["tables"] = {place: made for place, made in tables if kind_of(place) != "masks"}
    kind: Kind = "unconditional" if request.condition == "none" else description["kind"]
    index = _open_index(folder / INDEX, LatentStore(folder, description))
    notes = [f"latents of {description['name']}: {plural(len(index), 'image')}", *description["notes"]]
    if "colours" not in description:
        notes.append(
            "made before colour profiles were converted to sRGB; `latentflow check` says which images have others: "
            "if any do, precompute them again"
        )
    source = LatentFolder(
        name=data,
        examples=index,  # type: ignore[arg-type]  # a sequence; a tuple would be N objects
        kind=kind,
        classes=tuple(description["classes"]) if kind == "class" else (),
        notes=tuple(notes),
        root=folder,
    )
    decided = {
        f"--condition {request.condition}": request.condition not in ("auto", "none", description["kind"]),
        "--masks alpha": request.masks == "alpha",
        f"--missing-caption {request.missing_caption}": request.missing_caption != "error",
        "--columns": bool(request.columns),
        f"--colours {request.colours}": request.colours != "srgb",
    }
    for flag, is_given in decided.items():
        if is_given:
            source.refuse_decided(flag)
    return source


def _open_index(path: Path, store: LatentStore) -> _Index:
    """Map the index.

    Raises:
        UserError: it is not what was written beside ``latents.json``.
    """
    arrow, description = import_arrow(), store.description
    fix = "Start the `latentflow precompute` line that made it again: it encodes only what is missing."
    with reading(path, OSError, fix=fix), path.open("rb") as file:
        hash = hash_stream(file)
    if hash != description["index"]:
        raise UserError(f"{path} cannot be read: it is not the one that {DESCRIPTION} was written with", fix)
    with reading(path, OSError, arrow.ArrowException, UnicodeDecodeError, fix=fix):
        table = arrow.ipc.open_file(arrow.memory_map(str(path))).read_all()
        table.validate(full=True)
    schema = index_schema(pixel_keys="pixel_key" in table.schema.names)
    if not table.schema.equals(schema) or table.num_rows != description["pictures"]:
        raise UserError(
            f"{path} does not hold the {description['pictures']} rows that {DESCRIPTION} tells of", fix
        )
    index = _Index(table, np.arange(table.num_rows, dtype=np.int32), store)
    ranges = {"bucket": (0, len(description["sizes"])), "class_id": (NO_CLASS, len(description["classes"]))}
    ranges |= dict.fromkeys(("repeats", "height", "width"), (1, 2**31))
    for name in schema.names:
        numbers = index.numbers(name) if name in ranges and not table[name].null_count else np.zeros(0)
        first, end = ranges.get(name, (0, 0))
        if (table[name].null_count and name != "label") or ((numbers < first) | (numbers >= end)).any():
            raise UserError(f"{path} is damaged: its column {name} holds what was never written", fix)
    without = table["label"].is_null().to_numpy()
    if description["kind"] == "class" and ((index.numbers("class_id") == NO_CLASS) != without).any():
        raise UserError(f"{path} is damaged: its column class_id holds what was never written", fix)
    return index


class LatentStore:
    """The shards in a folder of latents, and what they were made with."""

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.folder, self.description = folder, description
        self.kinds = {kind_of(place) for place in description["tables"]}

    def mask(self, key: str) -> Path | None:
        """Return where the mask of this key lies; None where there is none, or masks are not wanted."""
        return self.folder / "masks" if key and "masks" in self.kinds else None

    def image(self, key: str) -> Image.Image:
        """Return the stored pixels of an image."""
        for shards in self._pixels:
            number, row = shards.find(digests([key]))[0]
            if number >= 0:
                pixels = shards.shard(number).row("pixels", row)
                return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        raise UserError(f"{self.folder} lacks an image", "Start its `latentflow precompute` line again.")

    @functools.cached_property
    def _pixels(self) -> list[ShardSet]:
        places = [place for place in self.description["tables"] if kind_of(place) == "pixels"]
        return [ShardSet(self.folder / place, "pixels", read_only=True) for place in places]


@dataclass(frozen=True)
class StoredExample(Example):
    """An image whose latents were stored, and perhaps its pixels and its mask; its file is not needed."""

    key: str = field(kw_only=True)
    own_pixel_key: str = field(kw_only=True)
    own_mask_key: str = field(kw_only=True)
    store: LatentStore = field(kw_only=True, repr=False, compare=False)

    def open(self) -> Image.Image:
        if "pixels" not in self.store.kinds:
            raise UserError(
                f"{self.store.folder} holds latents only, not the image {self.name}",
                "Start its `latentflow precompute` line again (with --pixels where images are needed): it makes what "
                "is missing or damaged.",
            )
        return self.store.image(self.own_pixel_key)

    def content_key(self) -> str:
        return self.key

    def pixel_key(self) -> str:
        return self.own_pixel_key

    def mask_key(self) -> str:
        return self.own_mask_key


@dataclass(frozen=True, eq=False)
class LatentFolder(Source):
    """The images of a folder of latents, or some of them."""

    precomputed = True

    @property
    def index(self) -> _Index:
        return self.examples  # type: ignore[return-value]  # a sequence; a tuple would be N objects

    @property
    def store(self) -> LatentStore:
        return self.index.store

    @property
    def autoencoder(self) -> str:
        return str(self.store.folder / AUTOENCODER)

    @property
    def has_masks(self) -> bool:
        return "masks" in self.store.kinds

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of what is stored of the images."""
        return tuple((height, width) for height, width in self.store.description["sizes"])

    def stored_sizes(self) -> StoredSizes:
        natural = np.stack([self.index.numbers(name) for name in ("height", "width")], axis=1)
        return StoredSizes(self.sizes, self.index.numbers("bucket"), natural)

    def shards(self, kind: str, settings: dict[str, object]) -> ShardSet:
        store = self.store
        if kind not in store.kinds:
            raise UserError(
                f"{store.folder} holds no {kind}, which inpainting and evaluation need",
                "Run its `latentflow precompute` line again with --pixels, or do without.",
            )
        wanted = json.loads(json.dumps(settings))
        place = place_of(kind, wanted["size"])
        held = store.description["tables"].get(place)
        if held is None:
            height, width = wanted["size"]
            raise UserError(
                f"{store.folder} holds no {kind} of {width} x {height} pixels",
                "Leave --resolution out, or precompute again into another folder.",
            )
        if held.get("flips"):
            wanted["flips"] = True  # those with mirror images serve without, too
        if differences := setting_differences(held, wanted):
            raise UserError(
                f"the {kind} in {store.folder} were made with {differences}",
                "Use those settings, or precompute again into another folder.",
            )
        return ShardSet(store.folder / place, kind, read_only=True)

    def adopt(self, data: DataConfig) -> DataConfig:
        side, tables = self.store.description["resolution"], self.store.description["tables"]
        made = next(made for place, made in tables.items() if kind_of(place) == "latents")
        if data.resolution not in (side, DataConfig.resolution):
            raise UserError(
                f"{self.name} holds latents of {side} pixels, not of {data.resolution}",
                "Leave --resolution out, or precompute again into another folder.",
            )
        if data.random_flip and not made["flips"]:
            raise UserError(
                f"{self.name} holds no mirror images",
                "Leave --random-flip out, or precompute again with it into another folder.",
            )
        background = "#{:02x}{:02x}{:02x}".format(*made["background"])
        return dataclasses.replace(data, resolution=side, background=background)

    def refuse_decided(self, flag: str) -> None:
        raise UserError(
            f"{self.name} is a folder of latents ({self.store.description['kind']}): {flag} was decided when it was "
            "made",
            "Leave the flag out, or give it to `latentflow precompute` with another output folder.",
        )

    def subset(self, indices: Sequence[int]) -> LatentFolder:
        return dataclasses.replace(self, examples=self.index.take(indices))  # type: ignore[arg-type]

    def once(self) -> LatentFolder:
        examples: Any = self.index.without_repeats()
        return dataclasses.replace(self, examples=examples, balanced=False)

    def all_captions(self) -> list[tuple[str, ...]]:
        return [tuple(texts) or ("",) for texts in self.index.values("texts")]

    def weights(self) -> list[float]:
        return self.index.numbers("weight")  # type: ignore[return-value]  # an array

    def uses(self) -> list[int]:
        return np.repeat(np.arange(len(self), dtype=np.int32), self.repeats())  # type: ignore[return-value]

    def own_repeats(self) -> Array:
        return self.index.numbers("repeats")

    def class_ids(self) -> list[int]:
        stored_classes = self.store.description["classes"]
        numbers = [self.classes.index(as_spelled(name, self.classes)) for name in stored_classes]
        stored = self.index.numbers("class_id")
        known = np.asarray(numbers, dtype=np.int64)[np.maximum(stored, 0)]
        return np.where(stored < 0, NO_CLASS, known)  # type: ignore[return-value]

    def groups(self) -> Array:
        return self.index.numbers("group")

    def content_keys(self) -> Iterable[str]:
        return self.index.values("key")

    def strata(self) -> list[str]:
        if self.kind == "unconditional":
            return [top_folder(name) for name in self.index.values("name")]
        return [label or "" for label in self.index.values("label")]

    def pixel_keys(self) -> Iterable[str]:
        return self.index.values("pixel_key")

    def masked_keys(self) -> Iterator[str | None]:
        keys = zip(self.index.values("key"), self.index.values("mask_key"), strict=True)
        return (f"{key} {mask}" if self.store.mask(mask) else None for key, mask in keys)

    def damage(self) -> list[str]:
        pixels, lines = digests(self.pixel_keys()), []
        keys = {"latents": pixels, "pixels": pixels, "masks": digests(self.masked_keys())}
        for place in self.store.description["tables"]:
            kind = kind_of(place)
            here = [number for number, size in enumerate(self.sizes) if place_of(kind, size) == place]
            wanted = keys[kind][np.isin(self.index.numbers("bucket"), here)]
            wanted = wanted[wanted != NO_KEY]
            shards = ShardSet(self.store.folder / place, kind, read_only=True)
            shards.verify()
            if missing := int((shards.find(wanted)[:, 0] < 0).sum()):
                lines.append(
                    f"{missing} of {len(wanted)} {place} are missing or damaged: start the `latentflow precompute` "
                    "line that made them again, it makes only these"
                )
        return lines

    def fingerprint(self) -> str:
        rows = hashlib.sha256(self.index.rows.tobytes()).hexdigest()
        return hashlib.sha256(f"{self.store.description['index']} {rows}".encode()).hexdigest()

    def order(self) -> str:
        return self.fingerprint()  # of which the rows are a part, in their order


class _Index(Sequence[StoredExample]):
    """The rows of ``index.arrow``, mapped, at some ``rows`` (int32): each is an example, made when it is asked for."""

    def __init__(self, table: Any, rows: Array, store: LatentStore, repeats: bool = True) -> None:
        self._table, self.rows, self.store, self._repeats = table, rows, store, repeats

    def take(self, places: Sequence[int]) -> _Index:
        rows = self.rows[np.asarray(places, dtype=np.int32)]
        return _Index(self._table, rows, self.store, self._repeats)

    def without_repeats(self) -> _Index:
        return _Index(self._table, self.rows, self.store, repeats=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[row] for row in range(len(self))[place]]
        row = int(self.rows[place])
        values = {name: self._table[name][row].as_py() for name in self._table.column_names}
        first, *more = values["texts"] or [None]
        return StoredExample(
            name=values["name"],
            text=first,
            texts=tuple(more),
            label=values["label"],
            mask=self.store.mask(values["mask_key"]),
            weight=values["weight"],
            repeats=values["repeats"],
            key=values["key"],
            own_pixel_key=values.get("pixel_key", values["key"]),
            own_mask_key=values["mask_key"],
            store=self.store,
        )

    def numbers(self, name: str) -> Array:
        """Return a column of numbers."""
        if name == "repeats" and not self._repeats:
            return np.ones(len(self), dtype=np.int32)
        column: Array = self._table[name].to_numpy()
        return column[self.rows]

    def values(self, name: str) -> Iterator[Any]:
        """Yield the entries of a column, a few thousand of them in memory at once."""
        if name == "pixel_key" and name not in self._table.column_names:
            name = "key"
        for start in range(0, len(self), 8192):
            rows = self.rows[start : start + 8192]
            first = int(rows.min())
            part = self._table[name].slice(first, int(rows.max()) - first + 1)
            yield from part.take(rows - first).to_pylist()


# ---------------------------------------------------------------- its files


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
    columns = {
        "name": "string", "texts": arrow.list_(arrow.string()), "label": "string", "class_id": "int32",
        "weight": "float32", "repeats": "int32", "key": "string", "pixel_key": "string", "mask_key": "string",
        "group": "int64", "bucket": "int32", "height": "int32", "width": "int32",
    }  # fmt: skip
    return arrow.schema(
        [arrow.field(*column) for column in columns.items() if pixel_keys or column[0] != "pixel_key"]
    )


def place_of(kind: str, size: Sequence[int]) -> str:
    """Return the folder of the shards of ``kind`` of images of (height, width) ``size``."""
    height, width = size
    return kind if height == width else f"{kind}-{height}x{width}"


def kind_of(place: str) -> str:
    """Return what the shards of a folder hold: "latents", "pixels" or "masks"."""
    return place.split("-")[0]


def import_arrow() -> Any:
    """Return pyarrow; UserError where it is not installed."""
    return import_optional("pyarrow", "a folder of latents")
