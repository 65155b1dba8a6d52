"""Control images in a loss: those of a batch as the network takes them, some dropped at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.labels import NO_LABEL
from ...models import Condition, ControlInputs
from ..loop.data_order import Stream
from ..loop.random_numbers import sent


class ControlImages:
    """Add the control images of a batch to its condition; a share of each kind is dropped in training.

    Which sample is without is a pure function of the seed and the sample's id, independent of what is dropped of the
    other kind and of the rest of the condition: so one network learns to draw under any part of it.

    Args:
        inputs: the control images that the network takes.
        dropout: share of the samples that are without.
        seed: of the run.
    """

    def __init__(self, inputs: ControlInputs, dropout: float, seed: int) -> None:
        self._inputs, self._dropout, self._seed = inputs, dropout, seed

    def __call__(self, condition: Condition, batch: Mapping[str, Any], *, training: bool) -> Condition:
        """Return the condition with what `values` returns."""
        return replace(condition, **self.values(batch, training=training))

    def values(self, batch: Mapping[str, Any], *, training: bool) -> dict[str, Tensor]:
        """Return ``control`` (B, C, h, w) and ``layout`` (B, H, W), where the network takes them.

        The batch holds ``sample_ids``, and perhaps ``control`` (B, C, h, w) or ``layout`` (B, 1, H, W) uint8, 255 = no
        label; what it lacks counts as dropped.
        """
        found: dict[str, Tensor] = {}
        latents = batch["latents"]
        if self._inputs.image:
            image = batch.get("control")
            found["control"] = (
                torch.zeros_like(latents)
                if image is None
                else image * self._kept(batch, "control", training)[:, None, None, None]
            )
        if self._inputs.labels:
            layout = batch.get("layout")
            if layout is None:
                sides = (side * self._inputs.cell for side in latents.shape[2:])
                layout = latents.new_full((len(latents), *sides), -1, dtype=torch.int64)
            else:
                kept, ids = self._kept(batch, "layout", training), layout[:, 0].long()
                layout = torch.where(kept[:, None, None] & (ids != NO_LABEL), ids, -1)
            found["layout"] = layout
        return found

    def _kept(self, batch: Mapping[str, Any], name: str, training: bool) -> Tensor:
        """Return (B,) bool: the rows that keep their control image of a kind, ``name`` in the batch."""
        # The first number of a sample is that of the first kind that the data have: so it was when they had but one.
        place = [kind for kind in ("control", "layout") if kind in batch].index(name)
        kept = [not training or self._keeps(number, place) for number in batch["sample_ids"]]
        return sent(torch.tensor(kept), batch["latents"].device)

    def _keeps(self, sample_id: int, place: int) -> bool:
        numbers = np.random.default_rng([self._seed, Stream.CONTROL, sample_id])
        return bool(numbers.uniform(size=place + 1)[place] >= self._dropout)
