"""The checkpoint that a student learns from: its guided velocity."""

from __future__ import annotations

import torch
from torch import Tensor

from ...families import FlowModel
from ...models import Condition
from ..loop.distributed import uncached_autocast


class VelocityTeacher:
    """The velocity of a model on the straight path, whatever its own path and prediction, guided at one scale.

    Args:
        model: the teacher. Its network is frozen.
        guidance: scale of classifier-free guidance; 1 is none.
    """

    def __init__(self, model: FlowModel, guidance: float) -> None:
        self._model, self._guidance = model.network_alone(), guidance  # on the network's device
        self._model.network.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return dx/dt (B, C, h, w) at x and t (B,), float32; rows whose condition is dropped are not guided."""
        if self._model.network.device != x.device:
            self._model.network.to(x.device)
        with uncached_autocast(x.device):
            return self._model.velocity(self._model.rows_of(condition, len(x)), self._guidance)(x, t)
