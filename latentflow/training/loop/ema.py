"""Moving averages of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .distributed import local
from .post_hoc_ema import exponent


def warmed_up(decay: float) -> Callable[[int], float]:
    """An exponential average's ``min(decay, (1 + step) / (10 + step))``: initial weights do not rule short runs."""
    return lambda step: min(decay, (1 + step) / (10 + step))


def power_function(length: float) -> Callable[[int], float]:
    """The average whose profile is a power of time: Karras et al. 2024 (EDM2, arXiv:2312.02696), section 3.1.

    Args:
        length: relative; see `exponent`.
    """
    power = exponent(length) + 1.0
    return lambda step: (1.0 - 1.0 / step) ** power


class WeightAverage:
    """Moving average of a module's trainable parameters, kept in float32 beside them.

    Args:
        decay: step (1-based) -> the share of the average that stays; see `warmed_up` and `power_function`.
    """

    def __init__(self, module: nn.Module, decay: Callable[[int], float]) -> None:
        self.decay = decay
        self._parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
        self.averages: dict[str, Tensor] = {
            name: one.detach().clone() for name, one in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int, instead: Mapping[Tensor, Tensor] | None = None) -> None:
        """Move the averages towards the current weights, after ``step`` (1-based) updates.

        Args:
            instead: parameter -> what to average in its place, or this process's part of it.
        """
        averages = [local(one) for one in self.averages.values()]
        weights = [local((instead or {}).get(one, one)) for one in self._parameters.values()]
        torch._foreach_lerp_(averages, weights, 1 - self.decay(step))

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
