"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .sharding import local


class WeightAverage:
    """Moving average of a module's trainable parameters, kept in float32 beside them.

    The decay grows as ``min(decay, (1 + step) / (10 + step))``, so that the initial weights do not
    rule short runs.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
        self.averages: dict[str, Tensor] = {
            name: one.detach().clone() for name, one in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the current weights, after ``step`` (1-based) updates."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [local(one) for one in self.averages.values()]
        torch._foreach_lerp_(averages, [local(one) for one in self._parameters.values()], 1 - decay)

    @torch.no_grad()
    def load(self, averages: dict[str, Tensor]) -> None:
        """Restore the averages from a checkpoint."""
        for name, average in self.averages.items():
            average.copy_(averages[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the module's weights are the averages; afterwards they are the live ones again.

        Not for a sharded module, whose weights' place in memory must stay.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            live = parameter.data
            parameter.data = self.averages[name]
            self.averages[name] = live
