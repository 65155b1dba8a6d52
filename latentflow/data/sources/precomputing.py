"""Writing a folder of latents (see ``latent_folder`` and ``latent_files``)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...config import DataConfig
from ...errors import UserError
from ...utils.files import replacing, storable
from ..cache.store import Array, ShardSet, digests, sweep
from ..cache.tensors import (
    Settings,
    encode_latents,
    latent_bytes,
    latent_settings,
    latent_table,
    located_pixels,
    mask_settings,
    mask_table,
    pixel_settings,
)
from ..checking.check import groups_of
from ..crops import Framing
from ..dataset import Source
from .latent_files import (
    AUTOENCODER,
    DESCRIPTION,
    INDEX,
    VERSION,
    import_arrow,
    index_schema,
    kind_of,
    place_of,
    read_description,
)

_ROWS_AT_ONCE = 65536


@dataclass(frozen=True, kw_only=True)
class Precomputation:
    """What a folder of latents is to hold.

    Attributes:
        framing: the images, all of them readable, and the size of each.
        vae: the frozen autoencoder, with its statistics.
        data: resolution, background, and whether mirror images are stored.
        pixels: whether to store the images themselves (uint8), for inpainting.
        given: fingerprint of the autoencoder as the user gave it, perhaps without statistics.
    """

    framing: Framing
    vae: Any
    data: DataConfig
    pixels: bool
    given: str

    @property
    def source(self) -> Source:
        return self.framing.source

    def __post_init__(self) -> None:
        if self.source.has_masks and not self.pixels:
            raise UserError(
                "the images have masks, and training with masks needs pixels",
                "Add --pixels to store them, or --masks none to leave the masks out.",
            )

    def tables(self) -> dict[str, Settings]:
        """The settings of every table, by the folder that it lies in."""
        background = self.data.background
        tables: dict[str, Settings] = {}
        for size in self.framing.sizes:
            made = {"latents": latent_settings(self.vae, size, background, self.data.random_flip)}
            if self.pixels:
                made["pixels"] = pixel_settings(size, background)
            if self.source.has_masks:
                made["masks"] = mask_settings(size)
            tables |= {place_of(kind, size): settings for kind, settings in made.items()}
        return tables

    def row_bytes(self) -> dict[str, int]:
        """Size of an image's row of every kind (the largest of all sizes of images)."""
        side = self.data.resolution
        sizes = {
            "latents": latent_bytes(self.vae, side, self.data.random_flip),
            "pixels": 3 * side**2,
            "masks": side**2,
        }
        kinds = {kind_of(name) for name in self.tables()}
        return {kind: size for kind, size in sizes.items() if kind in kinds}


def write_latents(
    wanted: Precomputation, folder: Path, *, batch_size: int, device: torch.device, progress: bool
) -> None:
    """Fill ``folder``; what it holds already is verified and kept. Several processes may do so at once.

    Raises:
        UserError: the folder holds latents that were made with other settings, or something else.
        OSError: the folder cannot be written.
    """
    import_arrow()
    tables = wanted.tables()
    _begin(wanted, folder, tables)
    source, data = wanted.source, wanted.data
    sets = {name: ShardSet(folder / name, kind_of(name)) for name in tables}
    for one in sets.values():
        one.folder.mkdir(exist_ok=True)
        sweep(one.folder)
        one.verify()
    for number, size in enumerate(wanted.framing.sizes):
        part = wanted.framing.part(number)
        latent_table(
            part, wanted.vae, size, sets[place_of("latents", size)], background=data.background,
            flips=data.random_flip, batch_size=batch_size, device=device, progress=progress,
        )  # fmt: skip
        if wanted.pixels:
            located_pixels(part, size, data.background, sets[place_of("pixels", size)], progress=progress)
        if source.has_masks:
            mask_table(part, size, sets[place_of("masks", size)], progress=progress)
    index = write_index(wanted.framing, folder, groups_of(source))
    describe(wanted, folder, tables, complete=True, index=index)


def plan_latents(wanted: Precomputation, folder: Path, *, batch_size: int, device: torch.device) -> list[str]:
    """What would be written and how long it takes; the time is measured on two batches."""
    keys = digests(set(wanted.source.pixel_keys()))
    done = np.zeros(len(keys), dtype=bool)
    for size in wanted.framing.sizes:
        shards = ShardSet(folder / place_of("latents", size), "latents", read_only=True)
        done |= shards.find(keys)[:, 0] >= 0
    sizes = wanted.row_bytes()
    total = sum(sizes.values()) * len(keys)
    some = list(wanted.source.examples[: 2 * batch_size])
    start = time.perf_counter()
    for _ in encode_latents(
        some,
        wanted.vae,
        wanted.data.resolution,
        wanted.data.background,
        wanted.data.random_flip,
        batch_size,
        device,
    ):
        pass
    each = (time.perf_counter() - start) / len(some)
    left = len(keys) - int(done.sum())
    parts = ", ".join(f"{name} {size * len(keys) / 1e9:.2f} GB" for name, size in sizes.items())
    return [
        f"images: {len(wanted.source)}, {len(keys)} of them different, {left} still to be encoded",
        f"on disk: {total / 1e9:.2f} GB ({parts})",
        f"time: {each * left / 60:.1f} minutes ({1 / each:.0f} images a second, measured)",
    ]


def own_autoencoder(folder: Path, given: str) -> Path | None:
    """The folder's own autoencoder, where there is one; it has the statistics that its latents were made with.

    Raises:
        UserError: it was made of another autoencoder than that of the fingerprint ``given``.
    """
    if not (folder / DESCRIPTION).is_file() or not (folder / AUTOENCODER).is_dir():
        return None
    if read_description(folder)["given"] != given:
        raise UserError(
            f"the latents in {folder} were made by another autoencoder", "Use another output folder."
        )
    return folder / AUTOENCODER


def _begin(wanted: Precomputation, folder: Path, tables: dict[str, Settings]) -> None:
    """The folder with its description and autoencoder, or the same one as before."""
    foreign = folder.is_dir() and any(path.suffix != ".tmp" for path in folder.iterdir())
    if foreign and not (folder / DESCRIPTION).is_file():
        raise UserError(f"{folder} is not empty and holds no latents", "Use another output folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / AUTOENCODER).is_dir():
        held = read_description(folder)["tables"]
        for name in held.keys() & tables.keys():
            asked = json.loads(json.dumps(tables[name]))
            if held[name] != asked:
                differ = [
                    f"{key} {held[name][key]}, not {asked[key]}"
                    for key in asked
                    if asked[key] != held[name][key]
                ]
                raise UserError(
                    f"the {name} in {folder} were made with {'; '.join(differ)}",
                    "Use another output folder, or the settings of the first time.",
                )
        return
    describe(wanted, folder, tables, complete=False, index="")
    with tempfile.TemporaryDirectory(dir=folder, suffix=".tmp") as temporary:
        wanted.vae.save_pretrained(Path(temporary) / AUTOENCODER)
        with contextlib.suppress(OSError):  # another process was first
            (Path(temporary) / AUTOENCODER).rename(folder / AUTOENCODER)


def describe(
    wanted: Precomputation, folder: Path, tables: dict[str, Settings], *, complete: bool, index: str
) -> None:
    """Write ``latents.json``; ``index`` is the hash of ``index.arrow``."""
    source = wanted.source
    description = {
        "version": VERSION,
        "complete": complete,
        "name": storable(source.name),
        "pictures": len(source),
        "kind": source.kind,
        "classes": source.classes,
        "notes": [storable(note) for note in source.notes],
        "resolution": wanted.data.resolution,
        "colours": wanted.data.colours,
        "sizes": wanted.framing.sizes,
        "tables": tables,
        "given": wanted.given,
        "index": index,
    }
    with replacing(folder / DESCRIPTION) as temporary:
        temporary.write_text(json.dumps(description, indent=2, ensure_ascii=False), encoding="utf-8")


def write_index(framing: Framing, folder: Path, groups: Array) -> str:
    """``index.arrow``, a row for each image in the source's order; its hash.

    ``groups`` (N,) are the numbers of their groups of near duplicates, which a split keeps together.
    """
    arrow = import_arrow()
    source = framing.source
    schema = index_schema(pixel_keys=any(one.pixel_key() != one.content_key() for one in source.examples))
    natural = np.asarray(framing.sizes)[framing.bucket] if framing.natural is None else framing.natural
    ids = {name: number for number, name in enumerate(source.classes)}
    with (
        replacing(folder / INDEX) as temporary,
        arrow.OSFile(str(temporary), "wb") as sink,
        arrow.ipc.new_file(sink, schema) as writer,
    ):
        for start in range(0, len(source), _ROWS_AT_ONCE):
            part = source.examples[start : start + _ROWS_AT_ONCE]
            rows = [
                {
                    "name": storable(example.name),  # a name of a file may be no text
                    "texts": list(example.captions),
                    "label": example.label,
                    "class_id": ids.get(example.label or "", -1),
                    "weight": example.weight,
                    "repeats": example.repeats,
                    "key": example.content_key(),
                    "pixel_key": example.pixel_key(),
                    "mask_key": example.mask_key(),
                    "group": int(groups[row]),
                    "bucket": int(framing.bucket[row]),
                    "height": int(natural[row, 0]),
                    "width": int(natural[row, 1]),
                }
                for row, example in enumerate(part, start)
            ]
            writer.write_batch(arrow.RecordBatch.from_pylist(rows, schema=schema))
    with (folder / INDEX).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
