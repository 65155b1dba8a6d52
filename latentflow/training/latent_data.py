"""Cached latents as training data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import LatentTable, Rows, Source
from .images import is_flipped
from .order import Draw

# Gives the condition's part of a batch for the pictures at some rows, used under these running numbers.
Conditions = Callable[[list[int], list[int]], dict[str, Tensor]]


class LatentData:
    """Cached latents as training data, each as often in an epoch as its picture's ``repeats`` say.

    Memory holds a few bytes for each picture; latents, pixels and masks are read when they are used.

    Args:
        source: the pictures, for their names, repeats and weights.
        table: their latents.
        conditions: what goes with them: a function, or rows such as ``class_labels`` (N,).
        views: further rows; those that show the picture, ``pixels`` (N, 3, H, W) and ``masks`` (N, 1, H, W), are
            mirrored with it.
        flips: mirror pictures at random, where the table has mirrored latents; which use of a picture is mirrored
            depends on the draw only.
    """

    def __init__(
        self,
        source: Source,
        table: LatentTable,
        conditions: Conditions | Mapping[str, Tensor],
        views: Mapping[str, Tensor | Rows] | None = None,
        *,
        flips: bool = True,
    ) -> None:
        self._source, self._table, self._views = source, table, views or {}
        self._conditions = conditions if callable(conditions) else rows_of(conditions)
        self._flips = flips and table.mean.shape[1] > 1
        self._uses = np.asarray(source.uses(), dtype=np.int32)
        weights = np.asarray(source.weights(), dtype=np.float32)
        self._weights = None if (weights == 1).all() else torch.from_numpy(weights)

    def __len__(self) -> int:
        return len(self._uses)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Any]:
        rows = [int(self._uses[draw.index]) for draw in draws]
        flips = [int(self._flips and is_flipped(draw.number)) for draw in draws]
        mean, std = self._table.batch(rows, flips)
        batch: dict[str, Any] = {"latents": mean}
        if std is not None:
            batch["latents_std"] = std
        mirrored = torch.tensor(flips).view(-1, 1, 1, 1) > 0
        for name, values in self._views.items():
            view = values[rows]
            batch[name] = torch.where(mirrored, view.flip(-1), view) if view.ndim == 4 else view
        if self._weights is not None:
            batch["weights"] = self._weights[rows]
        return batch | self._conditions(rows, [draw.number for draw in draws])

    def name(self, index: int) -> str:
        return self._source.examples[int(self._uses[index])].name


def rows_of(tables: Mapping[str, Tensor]) -> Conditions:
    """Conditions that are rows of tensors."""
    return lambda rows, numbers: {name: values[rows] for name, values in tables.items()}
