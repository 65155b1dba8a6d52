"""Tuning a solver to a velocity: the grid and the weights with which a few evaluations reach what many do.

Shaul et al. 2024 (Bespoke Non-Stationary Solvers, arXiv:2403.01329) fit the numbers of such a solver to the ends of
fine trajectories, by stochastic gradients through the network. Here damped Gauss-Newton steps (Levenberg-Marquardt) do,
one on each batch, from the best of several multistep methods and grids. They reduce the mean over the images of the
distance between where the solver ends and where the fine trajectory does. The derivative by each number is a difference
of two ends, for which only the steps after that number are taken again: the network needs no gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product

import torch
from torch import Tensor

from ..errors import UserError, whole
from .solvers import Solver, adams_bashforth, integrate
from .solvers.base import EULER
from .solvers.exponential import exponential_adams
from .solvers.non_stationary import NonStationary
from .tensors import Velocity, compute_dtype, require_finite, with_time_rows
from .times import checked_times, shifted

#: methods, and depths and shifts of a sine grid, of which the best is taken as a start
STARTS = (
    ("euler", 0.5, 1.0),
    *product(("adams-bashforth-2", "exponential"), (0.0, 0.5), (1.0, 1.5)),
)
_METHODS = {
    "euler": EULER,
    "adams-bashforth-2": adams_bashforth(2),
    "exponential": Solver(order=2, evaluations=1, start=partial(exponential_adams, limited=False)),
}
#: up to so many steps every step weighs all slopes before it, else so many and the last step all
_WHOLE_MEMORY, _MEMORY = 10, 4
# Root mean square of the move of a state from which a derivative is taken: far above the rounding of float32.
_MOVE = 1e-2
# Factors of the diagonal that are tried; more damping means a smaller step.
_DAMPING = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
#: evaluations of a fine trajectory
FINE = 100


@dataclass(frozen=True)
class Ends:
    """Noises of one batch, and where fine trajectories lead them.

    Attributes:
        velocity: (x, t) -> dx/dt of this batch.
        start, end: states (B, ...) at the first and the last time.
    """

    velocity: Velocity
    start: Tensor
    end: Tensor

    @classmethod
    def of(cls, velocity: Velocity, start: Tensor, times: Sequence[float], fine: int = FINE) -> Ends:
        """Follow fine trajectories, by the exponential Adams method in ``fine`` even steps."""
        grid = torch.linspace(times[0], times[-1], fine + 1, dtype=torch.float64)
        return cls(velocity, start, integrate(velocity, start, grid, "exponential-adams"))

    def errors(self, solver: NonStationary) -> Tensor:
        """Return the root mean square error (B,) of each end."""
        return rms(integrate(self.velocity, self.start, solver.times, solver.solver()) - self.end)


def rms(values: Tensor) -> Tensor:
    """Return the root mean square (B,) of each row of (B, ...), float64."""
    return values.double().reshape(len(values), -1).square().mean(1).sqrt()


def tune(
    batches: Sequence[Ends],
    times: Tensor | Sequence[float],
    *,
    rounds: int = 1,
) -> NonStationary:
    """Return a solver that is fitted to trajectories of a velocity.

    Args:
        batches: at least one; 32 images each suffice.
        times: a grid from noise to data with the steps that are wanted; its ends stay, the others are moved.
        rounds: Gauss-Newton steps on each batch.

    Raises:
        UserError: no batches; times that do not increase; values that are not finite.
    """
    grid = checked_times(times, rising=True)
    whole("the rounds of tuning", rounds, 0)
    if not batches:
        raise UserError("nothing to tune a solver to", "Give at least one batch.")

    numbers = _Numbers(min(starts(grid), key=lambda start: float(batches[0].errors(start).mean())))
    for _ in range(rounds if numbers.first else 0):  # one step has nothing to choose
        for batch in batches:
            numbers.improve(batch)
    return numbers.solver(numbers.values)


def starts(times: Sequence[float]) -> list[NonStationary]:
    """Return the methods of `STARTS`, their grids the given one as those would have made it of even steps."""
    grid = torch.tensor(times, dtype=torch.float64)
    length = grid[-1] - grid[0]
    found = []
    for name, depth, shift in STARTS:
        even = (grid - grid[0]) / length
        even = even - depth * torch.sin(2.0 * math.pi * even) / (2.0 * math.pi)
        moved = grid[0] + length * shifted(even, shift)
        moved[0], moved[-1] = grid[0], grid[-1]
        found.append(NonStationary.of(_METHODS[name], moved.tolist()))
    return found


def cost(steps: int, batches: Sequence[int], rounds: int = 1) -> int:
    """Return the number of evaluations of one image that `tune` takes.

    Args:
        batches: the number of images of each.
    """
    first = _Numbers(starts([i / steps for i in range(steps + 1)])[0]).first
    each = steps * (1 + len(_DAMPING)) + sum(steps - 1 - i for i in first) if first else 0
    return len(STARTS) * steps * batches[0] + rounds * each * sum(batches)


class _Numbers:
    """The free numbers of a solver: the times within, and of every step the increments but the last, which keeps their
    sum."""

    def __init__(self, start: NonStationary) -> None:
        steps = start.steps
        memory = steps if steps <= _WHOLE_MEMORY else _MEMORY - 1
        self.start = start
        self.places = [
            (i, j) for i in range(steps) for j in range(0 if i == steps - 1 else max(0, i - memory), i)
        ]
        #: the step after which each number changes the state
        self.first = [*range(steps - 1), *(i for i, _ in self.places)]
        given = [*start.times[1:-1], *(start.increments[i][j] for i, j in self.places)]
        self.values = torch.tensor(given, dtype=torch.float64)
        #: of the squared errors, half of their second derivatives by the values, of all batches so far
        self.normal = torch.zeros(len(given), len(given), dtype=torch.float64)

    def solver(self, values: Tensor) -> NonStationary:
        """Return the solver of such values.

        Raises:
            UserError: they are none, such as times that do not increase.
        """
        steps = self.start.steps
        times = [self.start.times[0], *values[: steps - 1].tolist(), self.start.times[-1]]
        rows = [[*row] for row in self.start.increments]
        for (i, j), value in zip(self.places, values[steps - 1 :].tolist(), strict=True):
            rows[i][j] = value
        for row, (t, t_next) in zip(rows, pairwise(times), strict=True):
            row[-1] = t_next - t - sum(row[:-1])
        return NonStationary(tuple(times), tuple(map(tuple, rows)))

    def improve(self, batch: Ends) -> None:
        """Take one damped Gauss-Newton step on a batch, unless none makes its mean error less."""
        now = self.solver(self.values)
        slopes: list[Tensor] = []
        end = _follow(batch, now, slopes)
        missed = (end - batch.end).double().flatten(1)
        errors = missed.square().mean(1).sqrt()
        # The mean of roots is wanted, not of squares: each image counts by its inverse error, none without bound.
        share = (1.0 / (errors + 0.1 * errors.median()).clamp_min(1e-12)).sqrt()[:, None]
        columns = []
        for number, after in enumerate(self.first):
            size = self._move(number, now, slopes)
            other = self.values.clone()
            other[number] += size
            moved = _follow(batch, self.solver(other), slopes[: after + 1])
            columns.append((share * (moved - end).double().flatten(1) / size).flatten())
        jacobian = torch.stack(columns, 1)
        # Batches before count in the curvature, as in a Kalman filter: the steps of later ones become shorter.
        self.normal = self.normal + jacobian.T @ jacobian
        gradient = jacobian.T @ (share * missed).flatten()
        least = float(errors.mean())
        for damping in _DAMPING:
            damped = self.normal + damping * self.normal.diag().clamp_min(1e-12).diag()
            values = self.values - torch.linalg.solve(damped, gradient)
            try:
                other_solver = self.solver(values)
            except UserError:  # times that do not increase
                continue
            error = float(rms(_follow(batch, other_solver, []) - batch.end).mean())
            if error < least:
                self.values, least = values, error

    def _move(self, number: int, now: NonStationary, slopes: Sequence[Tensor]) -> float:
        """Return the change of a number that moves the state after it by `_MOVE`; a time stays in its gap."""
        if number < now.steps - 1:
            a, b, c = now.times[number : number + 3]
            return min(_MOVE / _size(slopes[number]), 0.2 * (b - a), 0.2 * (c - b))
        i, j = self.places[number - now.steps + 1]
        return _MOVE / _size(slopes[j] - slopes[i])


def _follow(batch: Ends, solver: NonStationary, slopes: list[Tensor]) -> Tensor:
    """Return where the solver ends, in float32 at least; slopes of the first steps may be given, the others are added.

    Raises:
        UserError: a velocity is not finite.
    """
    x = batch.start.to(compute_dtype(batch.start))
    velocity, known = with_time_rows(batch.velocity), len(slopes)
    for i, row in enumerate(solver.increments):
        if i >= known:
            t = torch.full((), solver.times[i], dtype=x.dtype, device=x.device)
            slopes.append(velocity(x.to(batch.start.dtype), t).to(x.dtype))
            require_finite(slopes[-1], f"the velocity at t = {solver.times[i]:g}", "Use float32.")
        for increment, slope in zip(row, slopes[: i + 1], strict=True):
            x = torch.add(x, slope, alpha=increment)
    return x


def _size(values: Tensor) -> float:
    return max(float(values.double().square().mean().sqrt()), 1e-9)
