"""The figures of a step, which are read while the device already computes the next one."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from .loader import Batch, Values


class StepFigures:
    """Loss, gradient norms and whatever else a step reports: on their way to the CPU, and nobody waits for them.

    Args:
        step: 1-based.
        rate: its learning rate.
        sums: sums over the samples of this process; ``loss`` among them.
        norms: of each module's gradients.
        losses: what names the culprits if the loss is not finite.
        accelerator: of the run.

    Attributes:
        bad: bool scalar on the device: the loss or a gradient is not finite, so that no weight may change.
        seconds: that the run had taken when the step was under way.
    """

    def __init__(
        self,
        step: int,
        rate: float,
        sums: Values,
        norms: list[Tensor],
        losses: list[Batch],
        accelerator: Accelerator,
    ) -> None:
        self.step, self.losses, self.seconds = step, losses, 0.0
        self._rate, self._names = rate, [*sums]
        values = torch.stack([value.double() for value in sums.values()])
        if accelerator.num_processes > 1:
            values = accelerator.reduce(values, reduction="mean")
        # The norm of no gradients at all (a module that sits out) is on the CPU.
        read = torch.stack([norm.to(values, non_blocking=True) for norm in norms])
        loss, gradients = values[self._names.index("loss")].isfinite(), read.isfinite().all()
        # fp16: the scaler deals with overflowing gradients itself.
        self.bad = ~(loss if accelerator.scaler is not None else loss & gradients)
        self._read = torch.cat([values, read[:1], self.bad[None].to(values)])
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            pinned = torch.empty(self._read.shape, dtype=self._read.dtype, pin_memory=True)
            self._read = pinned.copy_(self._read, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> tuple[dict[str, float], bool]:
        """Return the values by their names, means over the processes, and whether all is finite; waits for the step."""
        if self._arrived is not None:
            self._arrived.synchronize()
        *values, norm, bad = self._read.tolist()
        return dict(zip(self._names, values, strict=True)) | {"lr": self._rate, "grad_norm": norm}, not bad
