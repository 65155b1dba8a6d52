"""Shortcut models and progressive distillation: a long step is two steps of half its length.

With m between r and t and x_m = x + (m - r) u(x, r, m), the average velocity satisfies

    (t - r) u(x, r, t) = (m - r) u(x, r, m) + (t - m) u(x_m, m, t),

with m half-way the network's own shorter steps are the target of its longer ones: all lengths at once in shortcut
models (Frans et al. 2024, arXiv:2410.12557, eq. 5), one after the other in progressive distillation (Salimans & Ho
2022, arXiv:2202.00512). No derivative is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..tensors import expand_t
from .average_velocity import AverageObjective, AverageVelocity, Draws, Interval


@dataclass(frozen=True)
class Shortcut(AverageObjective):
    """The settings of the objective "shortcut". Targets come from the averaged network, as in the paper.

    Attributes:
        share: of the samples that learn from two shorter steps; the paper's is a quarter.
        power: of the adaptive weight; the paper has none.
        guidance, mixing: see ``AverageObjective``.
        finest: number of the shortest steps from noise to data, a power of two; the paper's is 128. The halves of
            those are steps of the velocity itself. Trained are the lengths 1, 1/2, 1/4, ..., 1 / finest, each as often,
            from multiples of themselves.

    Raises:
        UserError: a value outside its bounds.
    """

    power: float = 0.0
    finest: int = 128

    name: ClassVar[str] = "shortcut"
    averaged: ClassVar[bool] = True
    follows_velocity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.finest == int(self.finest) and self.finest >= 1
        power_of_two = whole and not int(self.finest) & (int(self.finest) - 1)
        self._refuse(
            finest=(power_of_two, "Use a power of two; 128 is the paper's, 8 is enough for a teacher.")
        )

    @property
    def lengths(self) -> int:
        """Number of step lengths, from 1 / finest to 1."""
        return int(math.log2(self.finest)) + 1

    def interval(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Lengths 2^-k, k = 0 ... log2(finest), from multiples of themselves; velocities at the density's times."""
        # One coin says whether there is a length, and which: what is left of it is uniform again.
        level = (draws.coin / self.share * self.lengths).floor().clamp(max=self.lengths - 1)
        return self._steps(draws, 2.0**level)

    def _steps(self, draws: Draws, count: Tensor) -> tuple[Tensor, Tensor]:
        """One of ``count`` equal steps from noise to data, or a time of the density without a length."""
        place = (draws.second * count).floor().clamp(max=count - 1)
        long = draws.coin < self.share
        start = torch.where(long, place / count, draws.quantile(draws.first))
        return start, torch.where(long, (place + 1) / count, start)

    def target(self, average: AverageVelocity, over: Interval) -> Tensor:
        """The mean of two steps of half the length; no velocity is looked at."""
        x, r, t = over.x, over.r, over.t
        middle = (r + t) / 2
        shortest = (t - r) * self.finest < 1.5
        with torch.no_grad():
            first = average(x, r, torch.where(shortest, r, middle))
            reached = x + expand_t(middle - r, x) * first.to(x.dtype)
            second = average(reached, middle, torch.where(shortest, middle, t))
            return (first + second) / 2


@dataclass(frozen=True)
class Progressive(Shortcut):
    """The settings of the objective "progressive": the run is cut into stages, each with steps twice as long.

    Targets come from the network as it was when the stage began, those of the first stage from the teacher.

    Attributes:
        share: of the samples that learn steps; the others keep the velocity, which other solvers and inpainting follow.
        power, guidance, mixing: see ``AverageObjective``.
        finest: number of steps from noise to data in the first stage, a power of two; the last stage has one.

    Raises:
        UserError: a value outside its bounds.
    """

    share: float = 0.9
    finest: int = 8

    name: ClassVar[str] = "progressive"
    averaged: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True

    def stage(self, progress: Tensor) -> Tensor:
        """The number of the stage, from 0, after these shares of the run."""
        return (progress * self.lengths).floor().clamp(max=self.lengths - 1)

    def middle(self, stage: int) -> Tensor:
        """The share of the run in the middle of a stage, float64."""
        return torch.tensor((stage + 0.5) / self.lengths, dtype=torch.float64)

    def interval(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Steps of the stage's length from multiples of it; velocities at the density's times."""
        progress = torch.ones_like(draws.first) if draws.progress is None else draws.progress.to(draws.first)
        return self._steps(draws, self.finest / 2.0 ** self.stage(progress))
