"""The shared part of all inpainting methods: arguments and checks, the known region, the call to ``integrate``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ..paths import CondOT, Path
from ..solvers import Callback, Progress, Solver, Times, integrate
from ..solvers.base import SolverOptions, Step, schedule
from ..tensors import Generators, Velocity, compute_dtype, with_time_rows
from ..times import checked_times


@dataclass(frozen=True)
class KnownRegion:
    """The known region of a batch: its ``values`` (B, ...) (0 in the hole), and where the ``hole`` is (bool).

    These are latents; kept pixels are pasted back by the pipeline (``latentflow/pipeline/inpaint_batch.py``).
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

    def follow(self, solver: str | Solver, hold: Callable[[Tensor, float], Tensor]) -> Tensor:
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

    def take_steps(self, start: Callable[[SolverOptions], Step]) -> Tensor:
        """Follow stochastic steps of one evaluation each; at the end the known values are put in place."""
        return self.follow(Solver(order=1, evaluations=1, start=start, stochastic=True), self.known.finish)


@dataclass(frozen=True)
class Inpainting:
    """An entry of ``INPAINTING``; called with a velocity, it fills the hole. The arguments of all entries are here.

    Attributes:
        name: its name for users.
        fill: (problem, solver, **settings) -> x; without the solver where the steps are its own.
        solver: default solver; None: the steps are its own, and a solver is refused.
    """

    name: str
    fill: Callable[..., Tensor]
    solver: str | None = None

    def __call__(
        self,
        velocity: Velocity,
        x0: Tensor,
        known: Tensor,
        mask: Tensor,
        times: Times,
        *,
        solver: str | Solver | None = None,
        path: Path | None = None,
        generator: Generators = None,
        callback: Callback | None = None,
        progress: Progress = False,
        **settings: Any,
    ) -> Tensor:
        """Sample the hole where the rest is known.

        Args:
            velocity: (x, t) -> dx/dt.
            x0: (B, C, h, w) noise at times[0] = 0, or the state of the path at times[0] > 0.
            known: (B, C, h, w), read where the mask is 0 only.
            mask: (B, 1, h, w) or broadcastable to x0; above 0 = repaint.
            times: N + 1 increasing times in [0, 1].
            solver: any; default: the method's own.
            path: of the velocity; default: the straight path.
            generator: for the noise; a list with one for each row makes every row independent of the others.
            callback, progress: as of ``integrate``. A tensor that the callback returns replaces x in the hole.
            settings: the method's own.

        Returns:
            x at times[-1]; where sigma is 0 there (t = 1), its known region is exactly ``known``.

        Raises:
            UserError: a solver for a method that takes steps of its own; a setting out of range; times that do not
                increase; and as ``integrate``.
            ValueError: shapes that do not fit.
        """
        if solver is not None and self.solver is None:
            named = f"the solver '{solver}'" if isinstance(solver, str) else "a solver"
            raise UserError(
                f"the inpainting method '{self.name}' takes steps of its own, so it does not take {named}",
                "Leave the solver out, or use the method 'replacement' or 'repaint', which take any.",
            )
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
        region = KnownRegion(torch.where(hole, 0.0, known.to(x0.device, precision)), hole, path or CondOT())
        follow = with_time_rows(velocity)
        wide: Velocity = lambda x, t: follow(x.to(dtype), t).to(precision)  # noqa: E731
        problem = InpaintProblem(wide, x0.to(precision), region, grid, dtype, generator, callback, progress)
        own = () if self.solver is None else (solver or self.solver,)
        return self.fill(problem, *own, **settings)
