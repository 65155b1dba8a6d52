"""Couplings: how source rows are paired with data rows before a path joins them.

A new coupling is one class with this ``__call__``, and one line in ``COUPLINGS``. The data and its condition
stay put; only the source rows move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Coupling(Protocol):
    """Returns the source rows in the order in which they pair with ``x1``, row by row."""

    def __call__(
        self,
        x0: Tensor,
        x1: Tensor,
        condition: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(B, ...) source and data -> (B, ...) source."""
        ...


@dataclass(frozen=True)
class Independent:
    """pi(x0, x1) = p(x0) p(x1): rows drawn independently are already paired so."""

    def __call__(
        self,
        x0: Tensor,
        x1: Tensor,
        condition: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``x0`` itself.

        Raises:
            ValueError: x0 and x1 have different numbers of rows.
        """
        if x0.shape[0] != x1.shape[0]:
            raise ValueError(f"{x0.shape[0]} source rows for {x1.shape[0]} data rows: draw one for each")
        return x0


COUPLINGS: dict[str, type[Coupling]] = {
    "independent": Independent,
}
