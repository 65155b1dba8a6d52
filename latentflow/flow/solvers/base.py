"""A solver: a step from t to t_next, and the entry of ``SOLVERS`` that describes it."""

from __future__ import annotations

from collections.abc import Callable
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
    """``velocity``, counting its calls in ``evaluations``: the NFE of a sampler.

    A guided velocity counts as one, however often it calls networks inside: to count those, wrap them.
    """

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = with_time_rows(velocity)
        self.evaluations = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.evaluations += 1
        return self.velocity(x, t)


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
        start: makes the step function of one integration; what that closes over is its memory.
        stochastic: draws noise, from the generator in the options.
    """

    order: int
    evaluations: int | None
    start: Callable[[SolverOptions], Step]
    stochastic: bool = False


def schedule(path: Path, t: float) -> tuple[float, float]:
    """(alpha, sigma) at t, in float64."""
    time = torch.tensor(t, dtype=torch.float64)
    return path.alpha(time).item(), path.sigma(time).item()
