"""Tensors over the vocabulary, read a few positions at a time: logits, guided logits, and draws from them.

A network's logits are (B, ..., V): with a large vocabulary by far the largest tensor of a sampling step. Nothing else
of that size is made. A token is drawn by inverting its distribution function at one uniform number, so that a position
takes one random number, not V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..tensors import compute_dtype, per_row, time_dtype

#: Elements that are read at a time: a share of the tensor, but not less than a piece that is worth a call.
SHARE, LEAST = 256, 2**16


class Draw(NamedTuple):
    """Entries drawn from rows: their ``place``, their ``weight``, and the ``total`` weight of the row; all (N,)."""

    place: Tensor
    weight: Tensor
    total: Tensor


def parts(count: int, width: int) -> list[slice]:
    """Return the parts in which ``count`` rows of ``width`` elements are read."""
    size = max(1, max(LEAST, count * width // SHARE) // width)
    return [slice(start, start + size) for start in range(0, count, size)]


def draw_by_rows(weights: Callable[[Tensor], Tensor], rows: Tensor, width: int, uniform: Tensor) -> Draw:
    """Draw an entry of each row with a probability in proportion to its weight.

    Args:
        weights: numbers of rows (n,) -> their weights, (n, width), >= 0. Called with a part of ``rows`` at a time.
        rows: (N,) the rows' numbers.
        uniform: (N,) numbers in [0, 1), one for each row. An entry of weight 0 is drawn from none, but where the
            whole row is 0.
    """
    wide = time_dtype(uniform.device)
    place = torch.empty_like(rows)
    weight, total = (torch.empty(rows.shape, dtype=wide, device=rows.device) for _ in range(2))
    for part in parts(len(rows), width):
        values = weights(rows[part])
        sums = values.cumsum(-1, dtype=wide)  # in float64: of 16,384 small probabilities none is rounded away
        total[part] = sums[:, -1]
        point = uniform[part].to(wide) * sums[:, -1]
        drawn = torch.searchsorted(sums, point[:, None], right=True).clamp_(max=width - 1)
        place[part] = drawn[:, 0]
        weight[part] = values.gather(1, drawn)[:, 0].to(wide)
    return Draw(place, weight, total)


@dataclass(frozen=True)
class Logits:
    """Logits of every position, (B, ..., V), guided where there are two: c + (w - 1) (c - u), put together when read.

    On log-probabilities or on logits, the rule gives the same distribution: a constant of a position cancels.

    Attributes:
        conditional: c, (B, ..., V).
        unconditional: u of the same shape, or None.
        extra: w - 1, () or (B,).
    """

    conditional: Tensor
    unconditional: Tensor | None = None
    extra: Tensor | None = None

    def rows(self, index: Tensor) -> Tensor:
        """Return the logits of the positions ``index`` (n,) (numbered through the batch): (n, V), float32 or better."""
        dtype = compute_dtype(self.conditional)
        place = _unravelled(index, self.conditional.shape[:-1])
        c = self.conditional[place].to(dtype)
        if self.unconditional is None or self.extra is None:
            return c
        u = self.unconditional[place].to(dtype)
        # An entry that is impossible in one of the two is left as it is under the condition.
        difference = c.sub(u).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return c.add_(difference.mul_(self._extra_of(index).to(dtype)))

    def dense(self) -> Tensor:
        """Return all of them, (B, ..., V)."""
        c = self.conditional
        if self.unconditional is None:
            return c
        return self.rows(torch.arange(c.shape[:-1].numel(), device=c.device)).reshape(c.shape)

    def draw(self, positions: Tensor, uniform: Tensor, temperature: float = 1.0) -> Draw:
        """Draw a token for each of ``positions`` (N,), numbered through the batch: softmax(logits / temperature)."""
        vocabulary = self.conditional.shape[-1]
        return draw_by_rows(
            lambda index: self.probabilities(index, temperature), positions, vocabulary, uniform
        )

    def probabilities(self, index: Tensor, temperature: float = 1.0) -> Tensor:
        """Return softmax(logits / temperature) of the positions ``index`` (n,): (n, V)."""
        rows = self.rows(index)
        if temperature != 1.0:  # below the largest, so that none overflows, however low the temperature is
            rows = rows.sub_(rows.detach().amax(-1, keepdim=True)).div_(max(temperature, 1e-30))
        return rows.softmax(-1)

    def _extra_of(self, index: Tensor) -> Tensor:
        assert self.extra is not None
        extra = self.extra.to(index.device)
        if not extra.ndim:
            return extra
        return per_row(extra[index // self.conditional.shape[1:-1].numel()], index[:, None])


def _unravelled(index: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """Return the places of numbers that count through ``shape``: flattened, logits whose vocabulary is not the last
    dimension in memory would be copied."""
    places: list[Tensor] = []
    for size in reversed(shape):
        places.insert(0, index % size)
        index = index // size
    return tuple(places)
