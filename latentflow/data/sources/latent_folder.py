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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from ...config import DataConfig
from ...errors import UserError, reading
from ..cache.store import Array, ShardSet, digests
from ..dataset import Example, Kind, Source
from .assemble import Wanted
from .latent_files import (
    AUTOENCODER,
    DESCRIPTION,
    INDEX,
    import_arrow,
    index_schema,
    kind_of,
    place_of,
    read_description,
)


def is_latent_folder(data: str) -> bool:
    """Whether DATA is a folder of latents."""
    return (Path(data).expanduser() / DESCRIPTION).is_file()


def read_latent_folder(data: str, wanted: Wanted) -> LatentFolder:
    """The source in a folder of latents. Condition and masks were decided when it was made; "none" does without.

    Raises:
        UserError: it is not complete, was written by another version, or does not hold what is wanted.
    """
    folder = Path(data).expanduser()
    description = read_description(folder)
    if not description["complete"]:
        raise UserError(
            f"{folder} is not complete: `latentflow precompute` was stopped",
            "Start the line that made it again: it goes on where it stopped.",
        )
    _refuse_decided(data, description, wanted)
    if wanted.masks == "none":
        tables = description["tables"].items()
        description["tables"] = {name: made for name, made in tables if kind_of(name) != "masks"}
    kind: Kind = "unconditional" if wanted.condition == "none" else description["kind"]
    index = _open_index(folder / INDEX, description)
    store = LatentStore(folder, description)
    notes = [f"latents of {description['name']}: {len(index)} images", *description["notes"]]
    if "colours" not in description:
        notes.append(
            "made before colour profiles were converted to sRGB; `latentflow check` says which images have others: "
            "if any do, precompute them again"
        )
    return LatentFolder(
        name=data,
        examples=_Examples(store, index, None),  # type: ignore[arg-type]  # a sequence; a tuple would be N objects
        kind=kind,
        classes=tuple(description["classes"]) if kind == "class" else (),
        notes=tuple(notes),
        root=folder,
        store=store,
        index=index,
    )


def _refuse_decided(data: str, description: dict[str, Any], wanted: Wanted) -> None:
    refused = {
        f"--condition {wanted.condition}": wanted.condition not in ("auto", "none", description["kind"]),
        "--masks alpha": wanted.masks == "alpha",
        f"--missing-caption {wanted.missing_caption}": wanted.missing_caption != "error",
        "--columns": bool(wanted.columns),
        f"--colours {wanted.colours}": wanted.colours != "srgb",
    }
    for flag, is_refused in refused.items():
        if is_refused:
            raise UserError(
                f"{data} is a folder of latents ({description['kind']}): {flag} was decided when it was made",
                "Leave the flag out, or give it to `latentflow precompute` with another output folder.",
            )


def _open_index(path: Path, description: dict[str, Any]) -> _Index:
    """The index, mapped.

    Raises:
        UserError: it is not what was written beside ``latents.json``.
    """
    arrow = import_arrow()
    fix = "Start the `latentflow precompute` line that made it again: it encodes only what is missing."
    with reading(path, OSError, fix=fix), path.open("rb") as file:
        hash = hashlib.file_digest(file, "sha256").hexdigest()
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
    index = _Index(table)
    least = 0 if description["kind"] == "class" else -1
    ranges = {"bucket": (0, len(description["sizes"])), "class_id": (least, len(description["classes"]))}
    ranges |= dict.fromkeys(("repeats", "height", "width"), (1, 2**31))
    for name in schema.names:
        numbers = index.numbers(name, None) if name in ranges and not table[name].null_count else np.zeros(0)
        first, end = ranges.get(name, (0, 0))
        if (table[name].null_count and name != "label") or ((numbers < first) | (numbers >= end)).any():
            raise UserError(f"{path} is damaged: its column {name} holds what was never written", fix)
    return index


class LatentStore:
    """The shards in a folder of latents, and what they were made with."""

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.folder, self.description = folder, description
        self.kinds = {kind_of(name) for name in description["tables"]}

    def shards(self, kind: str, settings: dict[str, object]) -> ShardSet:
        """The shards of ``kind``: latents, pixels or masks.

        Raises:
            UserError: there are none, or they were not made with these settings.
        """
        place = place_of(kind, settings["size"])  # type: ignore[arg-type]
        held = self.description["tables"].get(place)
        if kind not in self.kinds:
            raise UserError(
                f"{self.folder} holds no {kind}, which inpainting and evaluation need",
                "Run its `latentflow precompute` line again with --pixels, or do without.",
            )
        wanted = json.loads(json.dumps(settings))
        if held is None:
            height, width = wanted["size"]
            raise UserError(
                f"{self.folder} holds no {kind} of {width} x {height} pixels",
                "Leave --resolution out, or precompute again into another folder.",
            )
        differ = [
            f"{name} {held.get(name)}, not {wanted[name]}"
            for name in wanted
            if wanted[name] != held.get(name)
        ]
        if differ:
            raise UserError(
                f"the {kind} in {self.folder} were made with {'; '.join(differ)}",
                "Use those settings, or precompute again into another folder.",
            )
        return ShardSet(self.folder / place, kind, read_only=True)

    def mask(self, key: str) -> Path | None:
        """Where the mask of this key lies; None where there is none, or masks are not wanted."""
        return self.folder / "masks" if key and "masks" in self.kinds else None

    def image(self, key: str) -> Image.Image:
        """The stored pixels of an image."""
        for shards in self._pixels:
            if (place := shards.place(key)) is not None:
                number, row = place
                pixels = shards.shard(number).row("pixels", row)
                return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        raise UserError(f"{self.folder} lacks an image", "Start its `latentflow precompute` line again.")

    @functools.cached_property
    def _pixels(self) -> list[ShardSet]:
        places = [name for name in self.description["tables"] if kind_of(name) == "pixels"]
        return [ShardSet(self.folder / place, "pixels", read_only=True) for place in places]


@dataclass(frozen=True)
class StoredExample(Example):
    """An image of which only what was stored is there."""

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
    """The images of a folder of latents, or some of them. ``examples`` makes each when it is asked for."""

    store: LatentStore = field(kw_only=True)
    index: _Index = field(kw_only=True)
    rows: Array | None = field(kw_only=True, default=None)  # None: all

    @property
    def autoencoder(self) -> str:
        """The folder of the autoencoder."""
        return str(self.store.folder / AUTOENCODER)

    @property
    def has_masks(self) -> bool:
        return "masks" in self.store.kinds

    @property
    def has_flips(self) -> bool:
        """Whether it holds mirror images as well."""
        return bool(self._made["flips"])

    @property
    def _made(self) -> dict[str, Any]:
        """The settings of the latents, of one of the sizes."""
        tables = self.store.description["tables"].items()
        made: dict[str, Any] = next(one for name, one in tables if kind_of(name) == "latents")
        return made

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of what is stored of the images."""
        return tuple((height, width) for height, width in self.store.description["sizes"])

    def buckets(self) -> Array:
        """(N,): which of ``sizes`` each image has."""
        return self.index.numbers("bucket", self.rows)

    def natural(self) -> Array:
        """(N, 2): heights and widths of the images as they were."""
        return np.stack([self.index.numbers(name, self.rows) for name in ("height", "width")], axis=1)

    def adopt(self, data: DataConfig) -> DataConfig:
        """The settings of the data with what the folder decides: resolution and background.

        Raises:
            UserError: other ones were asked for, or mirror images, which it does not hold.
        """
        side = self.store.description["resolution"]
        background = "#{:02x}{:02x}{:02x}".format(*self._made["background"])
        if data.resolution not in (side, DataConfig.resolution):
            raise UserError(
                f"{self.name} holds latents of {side} pixels, not of {data.resolution}",
                "Leave --resolution out, or precompute again into another folder.",
            )
        if data.random_flip and not self.has_flips:
            raise UserError(
                f"{self.name} holds no mirror images",
                "Leave --random-flip out, or precompute again with it into another folder.",
            )
        return dataclasses.replace(data, resolution=side, background=background)

    def subset(self, indices: Sequence[int]) -> LatentFolder:
        chosen = np.asarray(indices, dtype=np.int32)
        rows = chosen if self.rows is None else self.rows[chosen]
        examples: Any = _Examples(self.store, self.index, rows)
        return dataclasses.replace(self, examples=examples, rows=rows)

    def once(self) -> LatentFolder:
        return dataclasses.replace(self, index=self.index.without_repeats())

    def captions(self) -> list[str]:
        return [captions[0] for captions in self.all_captions()]

    def all_captions(self) -> list[tuple[str, ...]]:
        return [tuple(texts) or ("",) for texts in self.index.values("texts", self.rows)]

    def weights(self) -> list[float]:
        return self.index.numbers("weight", self.rows)  # type: ignore[return-value]  # an array

    def uses(self) -> list[int]:
        repeats = self.index.numbers("repeats", self.rows)
        return np.repeat(np.arange(len(self), dtype=np.int32), repeats)  # type: ignore[return-value]

    def class_ids(self) -> list[int]:
        stored = self.index.numbers("class_id", self.rows)
        numbers = [self.classes.index(name) for name in self.store.description["classes"]]
        return np.asarray(numbers, dtype=np.int64)[stored]  # type: ignore[return-value]

    def groups(self) -> Array:
        """(N,): the number of the group of near duplicates that each image was in."""
        return self.index.numbers("group", self.rows)

    def content_keys(self) -> list[str]:
        return _Lazy(len(self), lambda: self.index.values("key", self.rows))  # type: ignore[return-value]

    def pixel_keys(self) -> list[str]:
        return _Lazy(len(self), lambda: self.index.values("pixel_key", self.rows))  # type: ignore[return-value]

    def damage(self) -> list[str]:
        """What is missing in the folder or is not what was written: every row is read."""
        keys, masks = list(self.content_keys()), self.index.values("mask_key", self.rows)
        pixel_keys = self.pixel_keys()
        wanted: dict[str, list[str]] = {name: [] for name in self.store.description["tables"]}
        for key, pixels, mask, bucket in zip(keys, pixel_keys, masks, self.buckets().tolist(), strict=True):
            held = {"latents": pixels, "pixels": pixels} | ({"masks": f"{key} {mask}"} if mask else {})
            for kind, what in held.items():
                if (place := place_of(kind, self.sizes[bucket])) in wanted:
                    wanted[place].append(what)
        told = []
        for place in wanted:
            shards = ShardSet(self.store.folder / place, kind_of(place), read_only=True)
            shards.verify()
            missing = int((shards.find(digests(wanted[place]))[:, 0] < 0).sum())
            if missing:
                told.append(
                    f"{missing} of {len(wanted[place])} {place} are missing or damaged: start the "
                    "`latentflow precompute` line that made them again, it makes only these"
                )
        return told

    def fingerprint(self) -> str:
        rows = np.arange(len(self), dtype=np.int32) if self.rows is None else self.rows
        told = f"{self.store.description['index']} {hashlib.sha256(rows.tobytes()).hexdigest()}"
        return hashlib.sha256(told.encode()).hexdigest()

    def order(self) -> str:
        return self.fingerprint()  # of which the rows are a part, in their order


class _Index:
    """The columns of ``index.arrow``, mapped."""

    def __init__(self, table: Any, repeats: bool = True) -> None:
        self._table, self._repeats = table, repeats
        self.has_pixel_keys = "pixel_key" in table.column_names  # else they are the keys

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def without_repeats(self) -> _Index:
        return _Index(self._table, repeats=False)

    def row(self, row: int) -> dict[str, Any]:
        values = {name: self._table[name][row].as_py() for name in self._table.column_names}
        return {"pixel_key": values["key"]} | values

    def numbers(self, name: str, rows: Array | None) -> Array:
        """A column of numbers at ``rows`` (None: all)."""
        if name == "repeats" and not self._repeats:
            return np.ones(len(self) if rows is None else len(rows), dtype=np.int32)
        column: Array = self._table[name].to_numpy()
        return column if rows is None else column[rows]

    def values(self, name: str, rows: Array | None) -> Iterator[Any]:
        """Entries of a column at ``rows`` (None: all), a few thousand of them in memory at once."""
        if name == "pixel_key" and not self.has_pixel_keys:
            name = "key"
        column, step = self._table[name], 8192
        for start in range(0, len(self) if rows is None else len(rows), step):
            part = column.slice(start, step) if rows is None else column.take(rows[start : start + step])
            yield from part.to_pylist()


class _Lazy(Sequence[str]):
    """Strings that are read each time they are iterated over."""

    def __init__(self, length: int, read: Callable[[], Iterator[str]]) -> None:
        self._length, self._read = length, read

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[str]:
        return self._read()

    def __getitem__(self, index: Any) -> Any:
        return list(self._read())[index]


class _Examples(Sequence[StoredExample]):
    def __init__(self, store: LatentStore, index: _Index, rows: Array | None) -> None:
        self._store, self._index, self._rows = store, index, rows

    def __len__(self) -> int:
        return len(self._index) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, place: int) -> StoredExample: ...
    @overload
    def __getitem__(self, place: slice) -> list[StoredExample]: ...
    def __getitem__(self, place: int | slice) -> StoredExample | list[StoredExample]:
        if isinstance(place, slice):
            return [self[one] for one in range(len(self))[place]]
        place = range(len(self))[place]
        row = self._index.row(place if self._rows is None else int(self._rows[place]))
        texts = row["texts"]
        return StoredExample(
            name=row["name"],
            text=texts[0] if texts else None,
            texts=tuple(texts[1:]),
            label=row["label"],
            mask=self._store.mask(row["mask_key"]),
            weight=row["weight"],
            repeats=row["repeats"],
            key=row["key"],
            own_pixel_key=row["pixel_key"],
            own_mask_key=row["mask_key"],
            store=self._store,
        )
