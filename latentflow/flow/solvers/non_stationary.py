"""Solvers of stored numbers: a time grid, and for every step of it the weights of all slopes so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ...errors import UserError
from ..paths import CondOT
from .base import Field, Solver, SolverOptions, Step, combine


@dataclass(frozen=True)
class NonStationary:
    """The numbers of an explicit solver of one grid, with one evaluation a step.

    x_{i+1} = x_i + sum_j increments[i][j] u_j with u_j = velocity(x_j, times[j]), j <= i. Every multistep method is
    one, and every explicit Runge-Kutta method on the grid of its stages: the non-stationary solvers of Shaul et al.
    2024 (arXiv:2403.01329), theorem 3.2, of which these are the ones that integrate a constant velocity exactly:
    increments[i] sum to times[i + 1] - times[i].

    Attributes:
        times: N + 1, strictly increasing, in [0, 1].
        increments: N rows, row i of i + 1 numbers.

    Raises:
        UserError: they are not of these shapes, not finite, or do not sum up.
    """

    times: tuple[float, ...]
    increments: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        times, rows = self.times, self.increments
        fix = "Tune the sampler again: latentflow tune-sampler CHECKPOINT."
        if len(times) < 2 or not all(0.0 <= a < b <= 1.0 for a, b in pairwise(times)):
            raise UserError(f"the times of a stored solver are {[*times]}", fix)
        if [len(row) for row in rows] != [*range(1, len(times))]:
            raise UserError(
                f"a stored solver of {self.steps} steps has rows of {[*map(len, rows)]} numbers", fix
            )
        for i, row in enumerate(rows):
            if not abs(math.fsum(row) - (times[i + 1] - times[i])) < 1e-9:  # nor is NaN
                raise UserError(
                    f"step {i + 1} of a stored solver goes {math.fsum(row):g} far, not {times[i + 1] - times[i]:g}",
                    fix,
                )

    @property
    def steps(self) -> int:
        """Number of steps, and of evaluations."""
        return len(self.times) - 1

    @classmethod
    def of(cls, solver: Solver, times: Sequence[float]) -> NonStationary:
        """Return a multistep method of one evaluation a step on a grid, as such numbers.

        Args:
            solver: linear in x and the slopes, on the straight path: an Adams method, perhaps exponential.
        """
        count = len(times) - 1
        # The slope of step j is the unit vector j + 1, x at the start the unit vector 0: where x moves are the numbers.
        unit = torch.eye(count + 1, dtype=torch.float64)
        slopes = iter(unit[1:])
        step = solver.start(SolverOptions(path=CondOT(), score=None, rtol=0.0, atol=0.0, generator=None))
        x, rows = unit[0], []
        for i, (t, t_next) in enumerate(pairwise(times)):
            reached = step(lambda x, t: next(slopes), x, t, t_next)
            rows.append(tuple((reached - x).tolist()[1 : i + 2]))
            x = reached
        return cls(tuple(times), tuple(rows))

    def solver(self) -> Solver:
        """Return the solver, as ``integrate`` takes it; it goes along `times` only, all of them."""
        return Solver(order=1, evaluations=1, start=self._start)

    def _start(self, options: SolverOptions) -> Step:
        slopes: list[Tensor] = []

        def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
            i = len(slopes)
            if i >= self.steps or (t, t_next) != self.times[i : i + 2]:
                raise UserError(
                    f"a tuned solver is asked for a step from {t:g} to {t_next:g}, which is none of its {self.steps}",
                    "It goes from noise to data along its own times: leave sigmas and strength out.",
                )
            slopes.append(field(x, t))
            return combine(x, 1.0, self.increments[i], slopes)

        return step
