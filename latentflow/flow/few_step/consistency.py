"""Consistency in continuous time: from anywhere on a trajectory to its end. Lu & Song 2024 (sCM, arXiv:2410.11081).

A consistency function f(x, r) = x + (1 - r) u(x, r, 1) is constant along the flow: df/dr = v - u + (1 - r) du/dr = 0,
which is the identity of average velocities (`mean_flow`) for intervals that end at the data. What sCM adds are the two
things that keep its training stable: a normalised tangent df/dr and a warm-up of the derivative in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..solvers.base import Field, Solver, SolverOptions, Step
from ..tensors import expand_t, normal_like
from .average_velocity import AverageObjective, AverageVelocity, Draws, Interval, total_derivative


@dataclass(frozen=True)
class Consistency(AverageObjective):
    """The settings of the objective "consistency".

    Attributes:
        share: of the samples that learn the step to the data; the others keep the velocity, which other solvers and
            inpainting follow.
        power: 0.5 divides the tangent by its root mean square, sCM's tangent normalisation (their eq. 8 ff.); its
            constant c = 0.1 is ``floor`` squared.
        guidance, mixing: see ``AverageObjective``.
        warmup: share of the run in which the derivative's part of the tangent grows from 0 to all of it (sec. 4.2).

    Raises:
        UserError: a value outside its bounds.
    """

    share: float = 0.75
    power: float = 0.5
    warmup: float = 0.1

    name: ClassVar[str] = "consistency"
    floor: ClassVar[float] = 0.1**2
    differentiates: ClassVar[bool] = True
    sampler: ClassVar[str] = "consistency"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse(warmup=(0.0 <= self.warmup <= 1.0, "Use a share of the run, 0 to 1."))

    def interval(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """From the density's times to the data, t = 1."""
        start = draws.quantile(draws.first)
        return start, torch.where(draws.coin < self.share, torch.ones_like(start), start)

    def target(self, average: AverageVelocity, over: Interval) -> Tensor:
        """v + w (1 - r) du/dr with the warm-up w: u plus the tangent."""
        x, r, t = over.x, over.r, over.t
        warm = torch.ones_like(r)
        if over.progress is not None and self.warmup > 0:
            warm = (over.progress.to(r) / self.warmup).clamp(max=1.0)
        return over.velocity + expand_t(warm * (t - r), x) * total_derivative(
            average, x, r, t, over.direction
        )


def _steps(options: SolverOptions) -> Step:
    def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
        data = x + (1.0 - t) * field(x, t)
        if t_next == 1.0:
            return data
        return t_next * data + (1.0 - t_next) * normal_like(data, options.generator)

    return step


#: The solver that goes to the data in every step and adds noise again, up to the next time: Song et al. 2023
#: (arXiv:2303.01469), algorithm 1, on the straight path. It follows velocities that lead to the data however far that
#: is, ``average_as_velocity(average, [0, 1])``; of another velocity it is no sampler, and so stands in no table.
CONSISTENCY_STEPS = Solver(order=1, evaluations=1, start=_steps, stochastic=True)
