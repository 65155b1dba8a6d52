"""Cached latents as training data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..data import LatentTable, Source
from .images import is_flipped
from .order import Draw


class LatentData:
    """Cached latents in memory as training data.

    Args:
        source: the pictures, for their names.
        table: their latents.
        conditions: rows that go with them: ``class_labels`` (N,), ``input_ids`` and ``attention_mask`` (N, L), ...
        views: rows that show the picture, and are mirrored with it: ``pixels`` (N, 3, H, W), ``masks`` (N, 1, H, W).
    """

    def __init__(
        self,
        source: Source,
        table: LatentTable,
        conditions: Mapping[str, Tensor],
        views: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._source, self._table, self._conditions, self._views = source, table, conditions, views or {}

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Any]:
        rows = torch.tensor([draw.index for draw in draws])
        versions = self._table.mean.shape[1]
        flips = torch.tensor([int(versions > 1 and is_flipped(draw.number)) for draw in draws])
        batch: dict[str, Any] = {"latents": self._table.mean[rows, flips]}
        if self._table.std is not None:
            batch["latents_std"] = self._table.std[rows, flips]
        for name, values in self._views.items():
            batch[name] = torch.where(flips.view(-1, 1, 1, 1) > 0, values[rows].flip(-1), values[rows])
        return batch | {name: values[rows] for name, values in self._conditions.items()}

    def name(self, index: int) -> str:
        return self._source.examples[index].name
