"""The common part of all ways from noise to data: times, what is called after a step, and the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

#: (step, time at which it began, x) -> x
AfterStep: TypeAlias = Callable[[int, Tensor, Tensor], Tensor]
#: called as ``integrate`` is: (velocity, x, times, solver, callback=, progress=, generator=) -> x at times[-1]
Sampler: TypeAlias = Callable[..., Tensor]
# Times that differ by less are the same time of a grid, reached by different sums.
ROUNDING = 1e-9


def last_part(times: Tensor, strength: float) -> Tensor:
    """Return the part of a grid from t = 1 - ``strength`` on, which it begins with exactly; at strength 1 all of it."""
    if strength == 1.0:
        return times
    first = times[:1].clamp(min=1.0 - strength)
    return torch.cat([first, times[times > first + ROUNDING]])


class Interrupted(Exception):  # noqa: N818 - no error: the way out of any solver's loop
    """End a call after a step, with the ``latents`` as they are then."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__("interrupted by a callback")
        self.latents = latents
