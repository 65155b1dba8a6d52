"""A solver: a step from t to t_next, and the entry of ``SOLVERS`` that describes it.

An explicit Runge-Kutta method is its Butcher tableau.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..paths import Path
from ..tensors import Generators, Velocity, with_time_rows

#: The velocity as a solver sees it: (x, t as a Python float) -> dx/dt; checked, in x's own precision. (That of
#: ``integrate`` also takes t of shape (B,), for rows that step on their own.)
Field: TypeAlias = Callable[[Tensor, float], Tensor]
#: (field, x, t, t_next) -> x at t_next. Evaluates the field only between t and t_next.
Step: TypeAlias = Callable[[Field, Tensor, float, float], Tensor]


class Counted:
    """A velocity that counts its calls in ``evaluations``: the NFE of a sampler.

    A guided velocity counts as one, however often it calls networks inside: to count those, wrap them.
    """

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = with_time_rows(velocity)
        self.evaluations = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        value = self.velocity(x, t)
        self.evaluations += 1
        return value


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """Settings and functions that a solver may need beyond the velocity."""

    path: Path
    score: Velocity | None
    rtol: float
    atol: float
    generator: Generators


@dataclass(frozen=True, kw_only=True)
class Solver:
    """An entry of ``SOLVERS``.

    Attributes:
        order: global order of convergence (weak order where stochastic); a test holds every entry to it.
        evaluations: velocity evaluations per step; None where the solver decides.
        start: makes the step function of one integration; the variables that it closes over are its memory.
        stochastic: draws noise, from the generator in the options.
    """

    order: int
    evaluations: int | None
    start: Callable[[SolverOptions], Step]
    stochastic: bool = False


def schedule(path: Path, t: float) -> tuple[float, float]:
    """Return (alpha, sigma) at t, in float64."""
    time = torch.tensor(t, dtype=torch.float64)
    return path.alpha(time).item(), path.sigma(time).item()


def runge_kutta(
    order: int, nodes: Sequence[float], matrix: Sequence[Sequence[float]], weights: Sequence[float]
) -> Solver:
    """A Butcher tableau as a step: x + h sum_i b_i k_i with k_i = f(x + h sum_j a_ij k_j, t + c_i h)."""

    def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
        h = t_next - t
        slopes: list[Tensor] = []
        for node, row in zip(nodes, matrix, strict=True):
            # In this form nodes 0 and 1 are t and t_next exactly: rounding never steps out of [0, 1].
            slopes.append(field(combine(x, h, row, slopes), (1.0 - node) * t + node * t_next))
        return combine(x, h, weights, slopes)

    return Solver(order=order, evaluations=len(nodes), start=lambda options: step)


def combine(x: Tensor, h: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """x + h sum_i weights_i slopes_i."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = torch.add(x, slope, alpha=h * weight)
    return x


EULER = runge_kutta(1, nodes=[0], matrix=[[]], weights=[1])
HEUN = runge_kutta(2, nodes=[0, 1], matrix=[[], [1]], weights=[1 / 2, 1 / 2])
