"""A route past the middle blocks of a `DiT`: while it is trained, some tokens skip them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Route:
    """Tokens that pass through the blocks ``first`` .. ``last - 1``; the others come back behind them as they were.

    TREAD: Krause et al. 2025 (arXiv:2501.04765). The R registers, which stand before the tokens of the latent, always
    pass.

    Attributes:
        kept: (B, K) int64, ascending: the places of those that pass, among the N tokens of the latent.
        first: number of blocks before the route.
        last: number of blocks before its end; more than ``first``.
    """

    kept: Tensor
    first: int
    last: int

    def spares(self, blocks: int) -> bool:
        """Return True if only the kept tokens are there behind the first ``blocks`` blocks."""
        return self.first < blocks < self.last

    def leave(self, tokens: Tensor, rope: Rope | None, registers: int) -> tuple[Tensor, Rope | None]:
        """tokens (B, R + N, D), and rope, each (R + N, 1, d), of those that pass: (B, R + K, D), (B, R + K, 1, d)."""
        places = self._places(registers)
        rows = _rows(places, tokens.shape[1])
        passing = tokens.flatten(0, 1).index_select(0, rows).view(*places.shape, -1)
        return passing, None if rope is None else (rope[0][places], rope[1][places])

    def come_back(self, tokens: Tensor, passed: Tensor, registers: int) -> Tensor:
        """The tokens (B, R + N, D) that `leave` was given, with ``passed`` (B, R + K, D) in place of those it took."""
        rows = _rows(self._places(registers), tokens.shape[1])
        joined = tokens.to(passed.dtype).flatten(0, 1).index_copy(0, rows, passed.flatten(0, 1))
        return joined.view_as(tokens)

    def of(self, values: Tensor) -> Tensor:
        """The rows of ``values`` (B, N, F) that belong to the kept tokens, (B, K, F)."""
        return values.gather(1, self.kept[..., None].expand(-1, -1, values.shape[-1]))

    def _places(self, registers: int) -> Tensor:
        """(B, R + K): what passes, among registers and tokens."""
        first = torch.arange(registers, device=self.kept.device).expand(len(self.kept), -1)
        return torch.cat([first, self.kept + registers], dim=1)


def _rows(places: Tensor, tokens: int) -> Tensor:
    """(B * K,): places (B, K) among ``tokens`` of every sample, as places in the whole batch laid flat."""
    starts = torch.arange(len(places), device=places.device) * tokens
    return (places + starts[:, None]).flatten()
