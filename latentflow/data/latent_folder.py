"""A folder of latents that `latentflow precompute` wrote: a source to train from, without the pictures.

    latents.json     what it holds and how that was made
    index.arrow      a row for each picture: name, captions, class, weight, keys (Arrow's file format)
    autoencoder/     the autoencoder that encoded them
    latents/, pixels/, masks/    shards

The index is mapped, so a picture costs no memory until it is asked for.
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

from latentflow.errors import UserError

from .config import DataConfig
from .described import Wanted
from .examples import Example, Kind, Source
from .shards import Array, digests
from .store import ShardSet

VERSION = 1  # of the format
DESCRIPTION, INDEX, AUTOENCODER = "latents.json", "index.arrow", "autoencoder"


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
        description["tables"].pop("masks", None)
    kind: Kind = "unconditional" if wanted.condition == "none" else description["kind"]
    index = _open_index(folder / INDEX, description["index"])
    store = LatentStore(folder, description)
    return LatentFolder(
        name=data,
        examples=_Examples(store, index, None),  # type: ignore[arg-type]  # a sequence; a tuple would be N objects
        kind=kind,
        classes=tuple(description["classes"]) if kind == "class" else (),
        notes=(f"latents of {description['name']}: {len(index)} pictures", *description["notes"]),
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
    }
    for flag, is_refused in refused.items():
        if is_refused:
            raise UserError(
                f"{data} is a folder of latents ({description['kind']}): {flag} was decided when it was made",
                "Leave the flag out, or give it to `latentflow precompute` with another output folder.",
            )


def read_description(folder: Path) -> dict[str, Any]:
    """What ``latents.json`` says."""
    try:
        description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if description["version"] != VERSION:
            raise UserError(
                f"{folder} was written in version {description['version']} of its format, this is {VERSION}",
                "Update latentflow, or precompute again into another folder.",
            )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder / DESCRIPTION} cannot be read: {error}", "Precompute into another folder."
        ) from error
    return description


def _open_index(path: Path, hash: str) -> _Index:
    """The index, mapped.

    Raises:
        UserError: it is not what was written beside ``latents.json``.
    """
    arrow = import_arrow()
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != hash:
                raise ValueError(f"it is not the one that {DESCRIPTION} was written with")
        return _Index(arrow.ipc.open_file(arrow.memory_map(str(path))).read_all())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {error}",
            "Start the `latentflow precompute` line that made it again: it encodes only what is missing.",
        ) from error


class LatentStore:
    """The shards in a folder of latents, and what they were made with."""

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.folder, self.description = folder, description

    def shards(self, kind: str, settings: dict[str, object]) -> ShardSet:
        """The shards of ``kind``: latents, pixels or masks.

        Raises:
            UserError: there are none, or they were not made with these settings.
        """
        held = self.description["tables"].get(kind)
        if held is None:
            raise UserError(
                f"{self.folder} holds no {kind}, which inpainting and evaluation need",
                "Run its `latentflow precompute` line again with --pixels, or do without.",
            )
        wanted = json.loads(json.dumps(settings))
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
        return ShardSet(self.folder / kind, kind, read_only=True)

    def mask(self, key: str) -> Path | None:
        """Where the mask of this key lies; None where there is none, or masks are not wanted."""
        return self.folder / "masks" if key and "masks" in self.description["tables"] else None

    def picture(self, key: str) -> Image.Image:
        """The stored pixels of a picture."""
        shards = self._pixels
        place = shards.place(key)
        if place is None:
            raise UserError(
                f"{shards.folder} lacks a picture", "Start its `latentflow precompute` line again."
            )
        number, row = place
        pixels = shards.shard(number).row("pixels", row)
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))

    @functools.cached_property
    def _pixels(self) -> ShardSet:
        return ShardSet(self.folder / "pixels", "pixels", read_only=True)


@dataclass(frozen=True)
class StoredExample(Example):
    """A picture of which only what was stored is there."""

    key: str = field(kw_only=True)
    own_mask_key: str = field(kw_only=True)
    store: LatentStore = field(kw_only=True, repr=False, compare=False)

    def open(self) -> Image.Image:
        if "pixels" not in self.store.description["tables"]:
            raise UserError(
                f"{self.store.folder} holds latents only, not the picture {self.name}",
                "Start its `latentflow precompute` line again (with --pixels where pictures are needed): it makes what "
                "is missing or damaged.",
            )
        return self.store.picture(self.key)

    def content_key(self) -> str:
        return self.key

    def mask_key(self) -> str:
        return self.own_mask_key


@dataclass(frozen=True, eq=False)
class LatentFolder(Source):
    """The pictures of a folder of latents, or some of them. ``examples`` makes each when it is asked for."""

    store: LatentStore = field(kw_only=True)
    index: _Index = field(kw_only=True)
    rows: Array | None = field(kw_only=True, default=None)  # None: all

    @property
    def autoencoder(self) -> str:
        """The folder of the autoencoder."""
        return str(self.store.folder / AUTOENCODER)

    @property
    def has_masks(self) -> bool:
        return "masks" in self.store.description["tables"]

    @property
    def has_flips(self) -> bool:
        """Whether it holds mirror images as well."""
        return bool(self.store.description["tables"]["latents"]["flips"])

    def adopt(self, data: DataConfig) -> DataConfig:
        """The settings of the data with what the folder decides: resolution and background.

        Raises:
            UserError: other ones were asked for, or mirror images, which it does not hold.
        """
        held = self.store.description["tables"]["latents"]
        side, background = held["size"][0], "#{:02x}{:02x}{:02x}".format(*held["background"])
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
        return self.index.numbers("class_id", self.rows).astype(np.int64)  # type: ignore[return-value]

    def groups(self) -> Array:
        """(N,): the number of the group of near duplicates that each picture was in."""
        return self.index.numbers("group", self.rows)

    def content_keys(self) -> list[str]:
        return _Lazy(len(self), lambda: self.index.values("key", self.rows))  # type: ignore[return-value]

    def damage(self) -> list[str]:
        """What is missing in the folder or is not what was written: every row is read."""
        keys, masks = list(self.content_keys()), self.index.values("mask_key", self.rows)
        wanted = {"latents": keys, "pixels": keys}
        wanted["masks"] = [f"{key} {mask}" for key, mask in zip(keys, masks, strict=True) if mask]
        told = []
        for kind in self.store.description["tables"]:
            shards = ShardSet(self.store.folder / kind, kind, read_only=True)
            shards.verify()
            missing = int((shards.find(digests(wanted[kind]))[:, 0] < 0).sum())
            if missing:
                told.append(
                    f"{missing} of {len(wanted[kind])} {kind} are missing or damaged: start the "
                    "`latentflow precompute` line that made them again, it makes only these"
                )
        return told

    def fingerprint(self) -> str:
        rows = np.arange(len(self), dtype=np.int32) if self.rows is None else self.rows
        told = f"{self.store.description['index']} {hashlib.sha256(rows.tobytes()).hexdigest()}"
        return hashlib.sha256(told.encode()).hexdigest()


class _Index:
    """The columns of ``index.arrow``, mapped."""

    def __init__(self, table: Any, repeats: bool = True) -> None:
        self._table, self._repeats = table, repeats

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def without_repeats(self) -> _Index:
        return _Index(self._table, repeats=False)

    def row(self, row: int) -> dict[str, Any]:
        return {name: self._table[name][row].as_py() for name in self._table.column_names}

    def numbers(self, name: str, rows: Array | None) -> Array:
        """A column of numbers at ``rows`` (None: all)."""
        if name == "repeats" and not self._repeats:
            return np.ones(len(self) if rows is None else len(rows), dtype=np.int32)
        column: Array = self._table[name].to_numpy()
        return column if rows is None else column[rows]

    def values(self, name: str, rows: Array | None) -> Iterator[Any]:
        """Entries of a column at ``rows`` (None: all), a few thousand of them in memory at once."""
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
            own_mask_key=row["mask_key"],
            store=self._store,
        )


def import_arrow() -> Any:
    """pyarrow with its ``ipc``; UserError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise UserError(
            "folders of latents need pyarrow, which is not installed", 'pip install "latentflow[parquet]"'
        ) from None
    return pyarrow
