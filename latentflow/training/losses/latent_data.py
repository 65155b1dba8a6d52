"""Cached latents, and prepared images, as training data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data import Cropping, LatentTable, LazyTable, Source, pixels_to_images
from ..loop.data_order import Draw, seeded


class PixelData:
    """uint8 images (N, 3, H, W), in memory or cached; a batch holds ``images`` (B, 3, H, W) in [-1, 1].

    With ``flips`` every other use of an image, on average, is mirrored; which one depends on the draw only.
    """

    def __init__(self, source: Source, pixels: Tensor | LazyTable, *, flips: bool) -> None:
        self._source, self._pixels, self._flips = source, pixels, flips

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Any]:
        images = pixels_to_images(self._pixels[[draw.index for draw in draws]])
        if self._flips:
            mirrored = torch.tensor([is_flipped(draw.number) for draw in draws])
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return {"images": images}

    def name(self, index: int) -> str:
        return self._source.examples[index].name


def is_flipped(number: int) -> bool:
    """A fair coin for a draw's running number (the parity of a multiplicative hash)."""
    return bool((number * 0x9E3779B1 >> 15) & 1)


# Gives the condition's part of a batch for the images at some rows, used under these running numbers.
Conditions = Callable[[list[int], list[int]], dict[str, Tensor]]


@dataclass(frozen=True)
class Sized:
    """The images of one size, crop after crop of each.

    Attributes:
        table: their latents.
        views: further rows; those that show the image, ``pixels`` (N, 3, H, W) and ``masks`` (N, 1, H, W), are
            mirrored with it.
    """

    table: LatentTable
    views: Mapping[str, Tensor | LazyTable] = field(default_factory=dict)


class LatentData:
    """Cached latents as training data, each as often in an epoch as its image's ``repeats`` say.

    Memory holds a few bytes for each image; latents, pixels and masks are read when they are used.

    Args:
        framing: the images, and how they are cut.
        sized: what is cached of those of each size, in the framing's order.
        conditions: what goes with them: a function, or rows such as ``class_labels`` (N,).
        flips: mirror images at random, where the table has mirrored latents; which use of an image is mirrored
            depends on the draw only.
        told: add ``sizes`` (B, 6), what the network is told of sizes and crops.
        seed: of the crops.

    Attributes:
        groups: (N,) int64, the size of each use: a batch must be of one. None where there is but one.
    """

    def __init__(
        self,
        framing: Cropping,
        sized: Sequence[Sized],
        conditions: Conditions | Mapping[str, Tensor],
        *,
        flips: bool = True,
        told: bool = False,
        seed: int = 0,
    ) -> None:
        self._framing, self._sized, self._told, self._seed = framing, sized, told, seed
        self._conditions = conditions if callable(conditions) else rows_of(conditions)
        self._flips = flips and sized[0].table.mean.shape[1] > 1
        self._place = np.zeros(len(framing.source), dtype=np.int32)  # among those of the same size
        for members in framing.members:
            self._place[members] = np.arange(len(members))
        if told:
            _ = framing.centres  # now: later, in the processes that load, an image may have gone
        self._uses = np.asarray(framing.source.uses(), dtype=np.int32)
        self.groups = (
            torch.from_numpy(framing.bucket[self._uses].astype(np.int64)) if len(sized) > 1 else None
        )
        weights = np.asarray(framing.source.weights(), dtype=np.float32)
        self._weights = None if (weights == 1).all() else torch.from_numpy(weights)

    def __len__(self) -> int:
        return len(self._uses)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Any]:
        numbers = [draw.number for draw in draws]
        rows = self._uses[[draw.index for draw in draws]]
        crops = np.array([self._crop(number) for number in numbers])
        places = (self._place[rows] * self._framing.crops + crops).tolist()
        flips = [int(self._flips and is_flipped(number)) for number in numbers]
        sized = self._sized[int(self._framing.bucket[rows[0]])]
        batch = _views(sized, places, flips)
        if self._told:
            batch["sizes"] = torch.from_numpy(self._framing.size_conditioning(rows, crops, np.array(flips)))
        if self._weights is not None:
            batch["weights"] = self._weights[rows]
        return batch | self._conditions(rows.tolist(), numbers)

    def _crop(self, number: int) -> int:
        crops = self._framing.crops
        return 0 if crops == 1 else int(torch.randint(crops, (), generator=seeded(self._seed, 4, number)))

    def name(self, index: int) -> str:
        return self._framing.source.examples[int(self._uses[index])].name


def _views(sized: Sized, places: list[int], flips: list[int]) -> dict[str, Any]:
    mean, std = sized.table.batch(places, flips)
    batch: dict[str, Any] = {"latents": mean}
    if std is not None:
        batch["latents_std"] = std
    mirrored = torch.tensor(flips).view(-1, 1, 1, 1) > 0
    for name, values in sized.views.items():
        view = values[places]
        batch[name] = torch.where(mirrored, view.flip(-1), view) if view.ndim == 4 else view
    return batch


def rows_of(tables: Mapping[str, Tensor]) -> Conditions:
    """Conditions that are rows of tensors."""
    return lambda rows, numbers: {name: values[rows] for name, values in tables.items()}
