"""Training data: cached latents, or prepared images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data import Cropping, LatentTable, LazyTable, Source, pixels_to_images
from ..loop.data_order import SampleUse, Stream, seeded


class PixelData:
    """uint8 images (N, 3, H, W), in memory or cached; a batch holds ``images`` (B, 3, H, W) in [-1, 1].

    With ``flips`` every other use of an image, on average, is mirrored; which one depends on the sample's id only.
    """

    def __init__(self, source: Source, pixels: Tensor | LazyTable, *, flips: bool) -> None:
        self._source, self._pixels, self._flips = source, pixels, flips

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitems__(self, uses: list[SampleUse]) -> dict[str, Any]:
        images = pixels_to_images(self._pixels[[use.index for use in uses]])
        if self._flips:
            mirrored = torch.tensor([is_flipped(use.sample_id) for use in uses])
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return {"images": images}

    def name(self, index: int) -> str:
        return self._source.examples[index].name


def is_flipped(sample_id: int) -> bool:
    """Toss a fair coin for a sample's id (the parity of a multiplicative hash)."""
    return bool((sample_id * 0x9E3779B1 >> 15) & 1)


# (rows of images, ids of their uses) -> the condition's part of a batch.
Conditions = Callable[[list[int], list[int]], Mapping[str, Tensor | list[Tensor] | list[str]]]


@dataclass(frozen=True)
class BucketData:
    """The cached data of the images of one size, crop after crop of each.

    Attributes:
        table: their latents.
        views: further rows of tensors; those that show the image, ``pixels`` (N, 3, H, W) and ``masks``
            (N, 1, H, W), are mirrored with it.
        control: the latents of their control images.
    """

    table: LatentTable
    views: Mapping[str, Tensor | LazyTable] = field(default_factory=dict)
    control: LatentTable | None = None


class LatentData:
    """Cached latents as training data, each as many times in an epoch as its image's ``repeats`` say.

    Memory holds a few bytes for each image; latents, pixels and masks are read when they are used.

    Args:
        framing: the images, and how they are cut.
        buckets: the cached data of each size, in the framing's order.
        conditions: what goes with them: a function, or rows such as ``class_labels`` (N,).
        flips: mirror images at random, where the table has mirrored latents; which use of an image is mirrored
            depends on the sample's id only.
        size_conditioning: add ``sizes`` (B, 6), the sizes and crops that the network is conditioned on.
        seed: of the crops.

    Attributes:
        groups: (N,) int64, the size of each use: a batch holds one size only. None where there is but one.
    """

    def __init__(
        self,
        framing: Cropping,
        buckets: Sequence[BucketData],
        conditions: Conditions | Mapping[str, Tensor],
        *,
        flips: bool = True,
        size_conditioning: bool = False,
        seed: int = 0,
    ) -> None:
        self._framing, self._buckets, self._seed = framing, buckets, seed
        self._size_conditioning = size_conditioning
        self._conditions = conditions if callable(conditions) else rows_of(conditions)
        self._flips = flips and buckets[0].table.mean.shape[1] > 1
        self._place = np.zeros(len(framing.source), dtype=np.int32)  # among those of the same size
        for members in framing.members:
            self._place[members] = np.arange(len(members))
        if size_conditioning:
            _ = framing.centres  # now: later, in the processes that load, an image may have gone
        self._uses = np.asarray(framing.source.uses(), dtype=np.int32)
        self.groups = (
            torch.from_numpy(framing.bucket[self._uses].astype(np.int64)) if len(buckets) > 1 else None
        )
        weights = np.asarray(framing.source.weights(), dtype=np.float32)
        self._weights = None if (weights == 1).all() else torch.from_numpy(weights)

    def __len__(self) -> int:
        return len(self._uses)

    def __getitems__(self, uses: list[SampleUse]) -> dict[str, Any]:
        sample_ids = [use.sample_id for use in uses]
        rows = self._uses[[use.index for use in uses]]
        crops = np.array([self._crop(sample_id) for sample_id in sample_ids])
        places = (self._place[rows] * self._framing.crops + crops).tolist()
        flips = [int(self._flips and is_flipped(sample_id)) for sample_id in sample_ids]
        batch = _views(self._buckets[int(self._framing.bucket[rows[0]])], places, flips)
        if self._size_conditioning:
            batch["sizes"] = torch.from_numpy(self._framing.size_conditioning(rows, crops, np.array(flips)))
        if self._weights is not None:
            batch["weights"] = self._weights[rows]
        return {**batch, **self._conditions(rows.tolist(), sample_ids)}

    def _crop(self, sample_id: int) -> int:
        if (crops := self._framing.crops) == 1:
            return 0
        return int(torch.randint(crops, (), generator=seeded(self._seed, Stream.CROPS, sample_id)))

    def name(self, index: int) -> str:
        return self._framing.source.examples[int(self._uses[index])].name


def _views(bucket: BucketData, places: list[int], flips: list[int]) -> dict[str, Any]:
    mean, std = bucket.table.batch(places, flips)
    batch: dict[str, Any] = {"latents": mean}
    if std is not None:
        batch["latents_std"] = std
    if bucket.control is not None:
        batch["control"], _ = bucket.control.batch(places, flips)
    mirrored = torch.tensor(flips).view(-1, 1, 1, 1) > 0
    for name, values in bucket.views.items():
        view = values[places]
        batch[name] = torch.where(mirrored, view.flip(-1), view) if view.ndim == 4 else view
    return batch


def rows_of(tables: Mapping[str, Tensor]) -> Conditions:
    """Return conditions that are rows of tensors."""
    return lambda rows, sample_ids: {name: values[rows] for name, values in tables.items()}
