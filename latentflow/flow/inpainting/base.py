"""The shared part of all inpainting methods: the known region along the path, checks, the call to ``integrate``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ...errors import UserError
from ..paths import CondOT, Path
from ..solvers import Solver, integrate
from ..solvers.base import schedule
from ..tensors import Generators, Velocity, compute_dtype, with_time_rows
from ..times import checked_times

Times: TypeAlias = Tensor | Sequence[float]
#: (step index, t reached, x) -> x in its place, or None
Callback: TypeAlias = Callable[[int, Tensor, Tensor], Tensor | None]
Progress: TypeAlias = bool | Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class KnownRegion:
    """The known region of a batch: its ``values`` (B, ...) (0 in the hole), and where the ``hole`` is (bool).

    These are latents; kept pixels are pasted back by the pipeline (``latentflow/pipeline/inpaint.py``).
    """

    values: Tensor
    hole: Tensor
    path: Path

    def put(self, x: Tensor, values: Tensor) -> Tensor:
        """Return ``x`` with ``values`` outside the hole."""
        return torch.where(self.hole, x, values)

    def noise(self, x: Tensor, t: float) -> Tensor:
        """Return the noise x0 that, with the known values, makes the known region of ``x`` at t."""
        alpha, sigma = schedule(self.path, t)
        return (x - alpha * self.values) / sigma

    def hold(self, x: Tensor, noise: Tensor, t: float) -> Tensor:
        """Return ``x`` with the known region as it is on the path at t: alpha known + sigma noise."""
        alpha, sigma = schedule(self.path, t)
        return self.put(x, alpha * self.values + sigma * noise)

    def finish(self, x: Tensor, t: float) -> Tensor:
        """Return ``x`` with the known values in place, if no noise is left at t; otherwise ``x`` as it is."""
        alpha, sigma = schedule(self.path, t)
        return self.put(x, alpha * self.values) if sigma == 0.0 else x


@dataclass(frozen=True)
class InpaintProblem:
    """One call of a method, checked, in float32 or better."""

    velocity: Velocity
    x: Tensor
    known: KnownRegion
    times: list[float]
    dtype: torch.dtype
    generator: Generators
    callback: Callback | None
    progress: Progress

    def follow(
        self,
        solver: str | Solver,
        hold: Callable[[Tensor, float], Tensor],
    ) -> Tensor:
        """``integrate`` over the times; after each step ``hold(x, t)`` puts the known region in place."""

        def after(index: int, t: Tensor, x: Tensor) -> Tensor:
            reached = self.times[index + 1]
            x = hold(x, reached)
            shown = None if self.callback is None else self.callback(index, t, x.to(self.dtype))
            return x if shown is None else hold(shown.to(x), reached)

        x = integrate(
            self.velocity, self.x, self.times, solver,
            path=self.known.path, generator=self.generator, callback=after, progress=self.progress,
        )  # fmt: skip
        return x.to(self.dtype)


def prepare(
    velocity: Velocity,
    x0: Tensor,
    known: Tensor,
    mask: Tensor,
    times: Times,
    path: Path | None,
    generator: Generators,
    callback: Callback | None,
    progress: Progress,
) -> InpaintProblem:
    """Check a method's arguments.

    Raises:
        UserError: times that do not increase.
        ValueError: shapes that do not fit.
    """
    if known.shape != x0.shape:
        raise ValueError(f"known has shape {tuple(known.shape)} but x0 has shape {tuple(x0.shape)}")
    try:
        fits = torch.broadcast_shapes(mask.shape, x0.shape) == x0.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, which does not broadcast to that of x0, {tuple(x0.shape)}: "
            "pass (B, 1, h, w), 1 = repaint"
        )
    grid = checked_times(times, rising=True)
    precision, dtype = compute_dtype(x0), x0.dtype
    hole = mask.to(x0.device) > 0
    values = torch.where(hole, 0.0, known.to(x0.device, precision))
    velocity = with_time_rows(velocity)
    wide: Velocity = lambda x, t: velocity(x.to(dtype), t).to(precision)  # noqa: E731
    return InpaintProblem(
        wide, x0.to(precision), KnownRegion(values, hole, path or CondOT()), grid, dtype,
        generator, callback, progress,
    )  # fmt: skip


def refuse_solver(method: str, solver: str | Solver | None) -> None:
    """Refuse a solver for a method that takes steps of its own."""
    if solver is not None:
        named = f"the solver '{solver}'" if isinstance(solver, str) else "a solver"
        raise UserError(
            f"the inpainting method '{method}' takes steps of its own, so it does not take {named}",
            "Leave the solver out, or use the method 'replacement' or 'repaint', which take any.",
        )
