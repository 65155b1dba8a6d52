"""Writing a folder of latents (see ``latent_folder``)."""

from __future__ import annotations

import contextlib
import functools
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
from ...utils.files import replacing, restore_permissions, storable
from ..cache.store import Array, ShardSet, digests
from ..cache.tensors import (
    Settings,
    Transform,
    index_images,
    latent_transform,
    mask_transform,
    pixel_transform,
)
from ..crops import Cropping
from ..dataset import Example, Source
from ..splits import groups_of
from .files import hash_stream
from .latent_folder import (
    AUTOENCODER,
    DESCRIPTION,
    INDEX,
    VERSION,
    import_arrow,
    index_schema,
    kind_of,
    place_of,
    read_description,
    setting_differences,
)

_ROWS_AT_ONCE = 65536


@dataclass(frozen=True, kw_only=True)
class Precomputation:
    """The making of a folder of latents.

    Attributes:
        framing: the images, all of them readable, and the size of each.
        vae: the frozen autoencoder, with its statistics.
        data: resolution, background, and whether mirror images are stored.
        pixels: whether to store the images themselves (uint8), for inpainting.
        given: fingerprint of the autoencoder as the user gave it, perhaps without statistics.
        batch_size: images that are encoded at once.
        device: where they are encoded.
    """

    framing: Cropping
    vae: Any
    data: DataConfig
    pixels: bool
    given: str
    batch_size: int = 64
    device: str | torch.device = "cpu"

    @property
    def source(self) -> Source:
        return self.framing.source

    def __post_init__(self) -> None:
        if self.source.has_masks and not self.pixels:
            raise UserError(
                "the images have masks, and training with masks needs pixels",
                "Add --pixels to store them, or --masks none to leave the masks out.",
            )

    @functools.cached_property
    def transforms(self) -> dict[str, tuple[int, Transform[Example]]]:
        """The making of every table, by the folder that it lies in: the number of its size, and the transform."""
        data, found = self.data, dict[str, tuple[int, Transform[Example]]]()
        for number, size in enumerate(self.framing.sizes):
            made = [
                latent_transform(
                    size, data.background, self.vae, data.random_flip, self.batch_size, self.device
                )
            ]
            if self.pixels:
                made.append(pixel_transform(size, data.background))
            if self.source.has_masks:
                made.append(mask_transform(size))
            found |= {place_of(transform.kind, size): (number, transform) for transform in made}
        return found

    def tables(self) -> dict[str, Settings]:
        """Return the settings of every table, by the folder that it lies in."""
        return {place: transform.settings for place, (_, transform) in self.transforms.items()}


def write_latents(job: Precomputation, folder: Path) -> None:
    """Fill ``folder``; what it holds already is verified and kept. Several processes may do so at once.

    Raises:
        UserError: the folder holds latents that were made with other settings, or something else.
        OSError: the folder cannot be written.
    """
    import_arrow()
    _begin(job, folder)
    sets = {place: ShardSet(folder / place, kind_of(place)) for place in job.transforms}
    for shards in sets.values():
        shards.verify()
    for place, (number, transform) in job.transforms.items():
        index_images(job.framing.part(number), transform, sets[place])
    index = write_index(job.framing, folder, groups_of(job.source))
    describe(job, folder, complete=True, index=index)


def plan_latents(job: Precomputation, folder: Path) -> list[str]:
    """Return the plan: images, size on disk, and time, which is measured on two batches."""
    keys = digests(set(job.source.pixel_keys()))
    done = np.zeros(len(keys), dtype=bool)
    sizes: dict[str, int] = {}  # of an image's row, the largest of all sizes of images
    for place, (_, transform) in job.transforms.items():
        sizes[transform.kind] = max(transform.row_bytes, sizes.get(transform.kind, 0))
        if transform.kind == "latents":
            done |= ShardSet(folder / place, "latents", read_only=True).find(keys)[:, 0] >= 0
    some = list(job.source.examples[: 2 * job.batch_size])
    _, transform = job.transforms[place_of("latents", job.framing.sizes[0])]
    start = time.perf_counter()
    for _ in transform.encode(some):
        pass
    each = (time.perf_counter() - start) / len(some)
    left = len(keys) - int(done.sum())
    parts = ", ".join(f"{kind} {size * len(keys) / 1e9:.2f} GB" for kind, size in sizes.items())
    return [
        f"images: {len(job.source)}, {len(keys)} of them different, {left} still to be encoded",
        f"on disk: {sum(sizes.values()) * len(keys) / 1e9:.2f} GB ({parts})",
        f"time: {each * left / 60:.1f} minutes ({1 / each:.0f} images a second, measured)",
    ]


def own_autoencoder(folder: Path, given: str) -> Path | None:
    """Return the folder's own autoencoder, if any, with the statistics that its latents were made with.

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


def _begin(job: Precomputation, folder: Path) -> None:
    """Make the folder with its description and autoencoder; where they are there, compare the settings."""
    foreign = folder.is_dir() and any(path.suffix != ".tmp" for path in folder.iterdir())
    if foreign and not (folder / DESCRIPTION).is_file():
        raise UserError(f"{folder} is not empty and holds no latents", "Use another output folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / AUTOENCODER).is_dir():
        held, tables = read_description(folder)["tables"], json.loads(json.dumps(job.tables()))
        for place in held.keys() & tables.keys():
            if differences := setting_differences(held[place], tables[place]):
                raise UserError(
                    f"the {place} in {folder} were made with {differences}",
                    "Use another output folder, or the settings of the first time.",
                )
        return
    describe(job, folder, complete=False, index="")
    with tempfile.TemporaryDirectory(dir=folder, suffix=".tmp") as temporary:
        job.vae.save_pretrained(Path(temporary) / AUTOENCODER)
        restore_permissions(Path(temporary))
        with contextlib.suppress(OSError):  # another process was first
            (Path(temporary) / AUTOENCODER).rename(folder / AUTOENCODER)


def describe(job: Precomputation, folder: Path, *, complete: bool, index: str) -> None:
    """Write ``latents.json``; ``index`` is the hash of ``index.arrow``."""
    source = job.source
    description = {
        "version": VERSION,
        "complete": complete,
        "name": storable(source.name),
        "pictures": len(source),
        "kind": source.kind,
        "classes": source.classes,
        "notes": [storable(note) for note in source.notes],
        "resolution": job.data.resolution,
        "colours": job.data.colours,
        "sizes": job.framing.sizes,
        "tables": job.tables(),
        "given": job.given,
        "index": index,
    }
    with replacing(folder / DESCRIPTION) as temporary:
        temporary.write_text(json.dumps(description, indent=2, ensure_ascii=False), encoding="utf-8")


def write_index(framing: Cropping, folder: Path, groups: Array) -> str:
    """Write ``index.arrow``, a row for each image in the source's order, and return its hash.

    ``groups`` (N,) are the numbers of their groups of near duplicates, which a split keeps together.
    """
    arrow = import_arrow()
    source = framing.source
    schema = index_schema(
        pixel_keys=any(example.pixel_key() != example.content_key() for example in source.examples)
    )
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
        return hash_stream(file)
