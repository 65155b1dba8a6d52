"""The checkpoint that a student learns from: its guided velocity."""

from __future__ import annotations

import torch
from torch import Tensor

from ...models import Condition
from ...pipeline.generate import LatentFlowPipeline
from ..loop.distributed import uncached_autocast


class VelocityTeacher:
    """The velocity of a pipeline on the straight path, whatever its own path and prediction, guided at one scale.

    Args:
        pipe: the teacher. Its network is frozen.
        guidance: scale of classifier-free guidance; 1 is none.
    """

    def __init__(self, pipe: LatentFlowPipeline, guidance: float) -> None:
        names = ("path", "path_options", "prediction")
        # Without the other components: the device is the network's.
        self._pipe = LatentFlowPipeline(
            vae=None,
            transformer=pipe.transformer.requires_grad_(False).eval(),
            **{name: pipe.config[name] for name in names},
        )
        self._pipe._guidance_scale = guidance
        self._guided = guidance != 1.0

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return dx/dt (B, C, h, w) at x and t (B,), float32; rows whose condition is dropped are not guided."""
        if self._pipe.transformer.device != x.device:
            self._pipe.transformer.to(x.device)
        with uncached_autocast(x.device):
            against = condition.unconditional() if self._guided else None
            return self._pipe.velocity(condition, against)(x, t)
