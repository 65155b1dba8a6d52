"""MeanFlow and alpha-Flow: average velocities from the identity that their derivative satisfies.

MeanFlow is Geng et al. 2025 (arXiv:2505.13447), with their t and r turned round, because our t = 1 is data.
Differentiating (t - r) u = int_r^t v by r along the flow, with the end t fixed, gives (their eq. 6)

    u = v + (t - r) du/dr,        du/dr = (v . grad_x) u + (partial u / partial r).

alpha-Flow, Zhang et al. 2025 (arXiv:2510.20771), takes the derivative over the finite step from r to
s = r + alpha (t - r): at alpha = 1 its target is the velocity itself, at alpha = 0 that of MeanFlow; training goes from
the one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..tensors import expand_t, per_row
from .average_velocity import AverageObjective, AverageVelocity, Draws, Interval, total_derivative

_SHARPNESS = 25.0  # of alpha-Flow's sigmoid, its sec. 4.3
_CLAMPED = 5e-3  # alpha this near to 0 or 1 counts as 0 or 1


@dataclass(frozen=True)
class MeanFlow(AverageObjective):
    """The settings of the objective "mean-flow"; the defaults are those of the paper's ablations (its table 1).

    Attributes:
        share, power, guidance, mixing: see ``AverageObjective``.
        improved: 1 takes du/dr along the network's velocity u(x, r, r) instead of the sample's, which is that of one
            pair (noise, data) and therefore far noisier: improved MeanFlow, Geng et al. 2025 (arXiv:2512.02012),
            sec. 4. It costs one more evaluation, without a gradient, of the samples whose interval has a length.

    Raises:
        UserError: a value outside its bounds.
    """

    improved: int = 0

    name: ClassVar[str] = "mean-flow"
    differentiates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse(improved=(self.improved in (0, 1), "Use 0 or 1."))

    @property
    def own_velocity(self) -> bool:  # type: ignore[override]
        return bool(self.improved)

    def interval(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Two times in order (sec. 4.3, "Sampling r, t"); intervals without a length are at the earlier one."""
        first, second = draws.quantile(draws.first), draws.quantile(draws.second)
        start, end = torch.minimum(first, second), torch.maximum(first, second)
        return start, torch.where(draws.coin < self.share, end, start)

    def target(self, average: AverageVelocity, over: Interval) -> Tensor:
        """v + (t - r) du/dr, the derivative along the flow: eq. 9 of MeanFlow."""
        return over.velocity + over.length * total_derivative(average, over.x, over.r, over.t, over.direction)


@dataclass(frozen=True)
class AlphaFlow(MeanFlow):
    """The settings of the objective "alpha-flow".

    Attributes:
        share, power, guidance, mixing, improved: as of MeanFlow.
        begin, end: shares of the run between which alpha goes from 1 to 0, along a sigmoid.
        least: lower bound of alpha. Above 0 no derivative is ever taken, so that fused attention can be used
            throughout; a target costs two evaluations. At 0.5 it is the self-consistency of shortcut models,
            with a velocity as the first half.

    Raises:
        UserError: a value outside its bounds.
    """

    begin: float = 0.0
    end: float = 1.0
    least: float = 0.0

    name: ClassVar[str] = "alpha-flow"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse(
            begin=(0.0 <= self.begin < self.end, "Use a share of the run before its end."),
            end=(self.end <= 1.0, "Use a share of the run, up to 1."),
            least=(0.0 <= self.least < 1.0, "Use 0 to below 1."),
        )

    @property
    def differentiates(self) -> bool:  # type: ignore[override]
        return self.least < _CLAMPED

    def alpha(self, progress: Tensor) -> Tensor:
        """Return alpha after these shares of the run; exactly 0 or 1 where it is near to them (sec. 4.3)."""
        middle, width = (self.begin + self.end) / 2, self.end - self.begin
        alpha = 1.0 - torch.sigmoid((progress - middle) * _SHARPNESS / width)
        alpha = torch.where(alpha > 1.0 - _CLAMPED, 1.0, torch.where(alpha < _CLAMPED, 0.0, alpha))
        return alpha.clamp(min=self.least)

    def target(self, average: AverageVelocity, over: Interval) -> Tensor:
        """v + (t - s) (u(x_s, s, t) - u(x, r, t)) / (s - r) with x_s = x + (s - r) v, along the flow.

        Their loss, ||u - (alpha v + (1 - alpha) u(x_s, s, t))||^2 / alpha, has the gradient of this regression, whose
        limit at alpha = 0 is MeanFlow's.
        """
        x, r, t = over.x, over.r, over.t
        alpha = self.alpha(torch.ones_like(r) if over.progress is None else over.progress.to(r))
        derivative = alpha == 0.0
        if bool(derivative.all()):
            return super().target(average, over)
        step = torch.where(derivative, 1.0, alpha) * (t - r)
        with torch.no_grad():
            reached = x + expand_t(step, x) * over.direction.to(x.dtype)
            # At alpha = 1 the step ends at t, where nothing is left to go.
            change = average(reached, torch.minimum(r + step, t), t) - average(x, r, t)
            finite = over.velocity + per_row((1.0 - alpha) / alpha.clamp(min=_CLAMPED), x) * change
        if not bool(derivative.any()):
            return finite
        return torch.where(per_row(derivative, x), super().target(average, over), finite)
