"""Sources of tokens, p_0: what every position holds at t = 0, independently of the others.

A new one is one subclass of ``Source``, and one line in ``SOURCES``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Source(ABC):
    """A distribution of one token. Tokens of the data are 0 to V - 1; a source may add states behind them."""

    #: states beyond the vocabulary
    extra: int = 0

    @abstractmethod
    def probabilities(self, vocabulary: int) -> Tensor:
        """(V + extra,) float64: p_0."""

    @abstractmethod
    def draw(self, uniform: Tensor, vocabulary: int) -> Tensor:
        """Return tokens, int64 and shaped like the numbers ``uniform`` in [0, 1) that decide them."""


@dataclass(frozen=True)
class MaskSource(Source):
    """Every position holds the mask, the token V (behind the vocabulary), which is in no data.

    Austin et al. 2021 (D3PM, arXiv:2107.03006), sec. 3.1. What is not masked is known: the data token itself.
    """

    extra = 1

    def probabilities(self, vocabulary: int) -> Tensor:
        weights = torch.zeros(vocabulary + 1, dtype=torch.float64)
        weights[-1] = 1.0
        return weights

    def draw(self, uniform: Tensor, vocabulary: int) -> Tensor:
        return torch.full_like(uniform, vocabulary, dtype=torch.int64)


@dataclass(frozen=True)
class UniformSource(Source):
    """Every token of the vocabulary is as likely as any other."""

    def probabilities(self, vocabulary: int) -> Tensor:
        return torch.full((vocabulary,), 1.0 / vocabulary, dtype=torch.float64)

    def draw(self, uniform: Tensor, vocabulary: int) -> Tensor:
        return (uniform * vocabulary).long().clamp_(max=vocabulary - 1)


SOURCES: dict[str, type[Source]] = {"mask": MaskSource, "uniform": UniformSource}
