"""Conditions of a flow model, one row per image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, plural

if TYPE_CHECKING:
    from .model import FlowModel

#: one value for each row: a tensor (B, ...), or a list of B tensors of any shapes
Values: TypeAlias = Tensor | list[Tensor]


@dataclass(frozen=True, eq=False)
class Rows:
    """Conditions, one row per image.

    Attributes:
        model: the flow model that made them.
        values: name -> what guidance leaves out: embeddings of prompts, classes.
        kept: name -> what guidance does not leave out: what is known of the image, sizes.
    """

    model: FlowModel
    values: Mapping[str, Values]
    kept: Mapping[str, Values] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Rows:
        """Return the rows of ``index``: a number, a slice, or numbers (or a mask) of rows; always as rows."""
        places = torch.arange(len(self))[index].reshape(-1).tolist()
        return self._map(lambda value: _pick(value, places))

    def repeat(self, times: int) -> Rows:
        """Return every row ``times`` times, copies of one row next to one another."""
        return self[[row for row in range(len(self)) for _ in range(times)]]

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        """Join rows of one model. Of values that differ in their second dimension (tokens) the shorter are padded with
        zeros, and masks with False.

        Raises:
            ValueError: they do not hold the same values.
        """
        first = parts[0]
        for part in parts[1:]:
            for own, other in ((first.values, part.values), (first.kept, part.kept)):
                if own.keys() != other.keys():
                    raise ValueError(f"rows of {sorted(own)} cannot be joined with rows of {sorted(other)}")
        values = {name: _joined([part.values[name] for part in parts]) for name in first.values}
        kept = {name: _joined([part.kept[name] for part in parts]) for name in first.kept}
        return replace(first, values=values, kept=kept)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Rows:
        """Return the rows on ``device``, floating-point values in ``dtype``."""

        def moved(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None)

        return self._map(lambda value: [*map(moved, value)] if isinstance(value, list) else moved(value))

    def with_known(self, images: Tensor, masks: Tensor) -> Rows:
        """Return the rows of images that are known outside of a hole, for networks that were trained to inpaint.

        Args:
            images: (P, 3, H, W) in [-1, 1]; row b is of image b * P // B.
            masks: (P, 1, H, W) in {0, 1}, 1 = repaint.

        Raises:
            UserError: the network was not trained with masks.
        """
        return self.model.with_known(self, images, masks)

    def with_control(self, images: Tensor) -> Rows:
        """Return the rows of images that control what is drawn, for networks that take such an image.

        Args:
            images: (P, 3, H, W) in [-1, 1], of the size that is drawn; row b is of image b * P // B.

        Raises:
            UserError: the network takes no control image.
        """
        return self.model.with_control(self, images)

    def _map(self, function: Callable[[Values], Values]) -> Rows:
        values = {name: function(value) for name, value in self.values.items()}
        return replace(self, values=values, kept={name: function(value) for name, value in self.kept.items()})


def check_counts(rows: Rows, images: Tensor) -> None:
    """Refuse images (P, 3, H, W) for B rows where P does not divide B.

    Raises:
        UserError: says how many there are.
    """
    if images.ndim != 4 or not len(images) or len(rows) % len(images):
        raise UserError(
            f"{plural(len(images), 'image')} for {plural(len(rows), 'row')}",
            "Give images (P, 3, H, W), as many as rows or a part of them: row b is of image b * P // B.",
        )


def keep(rows: Rows, **values: Tensor) -> Rows:
    """Return rows that also keep values of P images: row b of B those of image b * P // B."""
    each = {name: value.repeat_interleave(len(rows) // len(value), 0) for name, value in values.items()}
    return replace(rows, kept={**rows.kept, **each})


def _pick(value: Values, places: list[int]) -> Values:
    return [value[place] for place in places] if isinstance(value, list) else value[places]


def _joined(parts: list[Values]) -> Values:
    """Return the values of several batches as one batch."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) < len(parts):
        return [row for part in parts for row in part]
    longest = max((part.shape[1] for part in tensors if part.ndim > 1), default=0)
    padding = [
        (0, 0) * (part.ndim - 2) + (0, longest - part.shape[1]) if part.ndim > 1 else () for part in tensors
    ]
    return torch.cat(
        [F.pad(part, pad) if any(pad) else part for part, pad in zip(tensors, padding, strict=True)]
    )
