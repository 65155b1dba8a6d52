"""Average velocities: one network evaluation takes x from any time to any later one.

An interval starts at r, nearer the noise, and ends at t (t = 1 is data). Where phi follows the flow from r to t,

    u(x_r, r, t) = (phi(x_r) - x_r) / (t - r),        u(x, r, r) = v(x, r),

so that x + (t - r) u is exact however long the step. An objective of average velocities says which intervals are
trained, and defines the target of u there by the velocity and by u itself. All are regressions::

    r, t = objective.interval(Draws(quantile, first, second, coin))
    target = objective.target(network, Interval(x, r, t, velocity))    # network(x, r, t) -> average velocity
    loss = average_velocity_loss(network(x, r, t), target, objective.power, objective.floor).mean()

and all are sampled by ``integrate(average_as_velocity(network, times), x0, times, "euler")``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ...errors import UserError
from ..tensors import Velocity, compute_dtype, expand_t, time_dtype

#: u(x, r, t): x (B, ...), r and t scalar tensors or (B,), r <= t; the result is shaped like x.
AverageVelocity: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]

# A time of a grid in float64 and the same in a network's float32 differ by less than this.
_ROUNDING = 1e-6


class Draws(NamedTuple):
    """Random numbers from which intervals are made.

    Attributes:
        quantile: quantile function of the density of the training times, uniform numbers -> times.
        first, second, coin: (B,) uniform numbers, independent.
        progress: (B,) share of the run that is done, in [0, 1], for settings that change during it; None: all of it.
    """

    quantile: Callable[[Tensor], Tensor]
    first: Tensor
    second: Tensor
    coin: Tensor
    progress: Tensor | None = None


class Interval(NamedTuple):
    """Intervals of the flow, one in each row, of a length above 0.

    Attributes:
        x: (B, ...) at the starts.
        r, t: (B,) start and end.
        velocity: shaped like ``x``: dx/dr there, of the sample or a teacher; u is the average of it.
        progress: of the draws.
        along: shaped like ``x``: the velocity whose trajectory is followed; None: ``velocity``. The network's own,
            u(x, r, r), is less noisy than a sample's.
    """

    x: Tensor
    r: Tensor
    t: Tensor
    velocity: Tensor
    progress: Tensor | None = None
    along: Tensor | None = None

    @property
    def direction(self) -> Tensor:
        """dx/dr of the trajectory that is followed."""
        return self.velocity if self.along is None else self.along

    @property
    def length(self) -> Tensor:
        """t - r, shaped to broadcast along the rows of ``x``."""
        return expand_t(self.t - self.r, self.x)


@dataclass(frozen=True)
class AverageObjective(ABC):
    """The settings that objectives of average velocities share; a subclass says what is trained.

    Attributes:
        share: share of the samples whose interval has a length; the others train the velocity itself. In (0, 1].
        power: p of the adaptive weight, see ``adaptive``. 0 is the plain squared error.
        guidance: scale of the classifier-free guidance that is trained into the network, so that a guided sample costs
            one evaluation; 1 is none.
        mixing: kappa of ``folded_velocity``, in [0, 1): how much of the guided velocity is the network's own.

    Raises:
        UserError: a value outside its bounds.
    """

    share: float = 0.25
    power: float = 1.0
    guidance: float = 1.0
    mixing: float = 0.0

    #: its name for users
    name: ClassVar[str]
    #: c of the adaptive weight
    floor: ClassVar[float] = 1e-3
    #: whether targets come from the averaged network
    averaged: ClassVar[bool] = False
    #: whether it needs a teacher
    needs_teacher: ClassVar[bool] = False
    #: whether targets are taken ``along`` the network's own velocity u(x, r, r) instead of the sample's
    own_velocity: ClassVar[bool] = False
    #: whether the targets of intervals look at the velocity
    follows_velocity: ClassVar[bool] = True
    #: whether a target takes forward-mode derivatives
    differentiates: ClassVar[bool] = False
    #: how sampling continues after a step: "average" goes on from there, "consistency" adds noise again
    sampler: ClassVar[str] = "average"

    def __post_init__(self) -> None:
        self._refuse(
            share=(0.0 < self.share <= 1.0, "Use more than 0, up to 1."),
            power=(0.0 <= self.power <= 2.0, "Use 0 to 2."),
            guidance=(0.0 < self.guidance < float("inf"), "Use 1 for none; 2 to 4 are usual."),
            mixing=(0.0 <= self.mixing < 1.0, "Use 0 to below 1; 0 is simplest."),
        )

    def _refuse(self, **bounds: tuple[bool, str]) -> None:
        """Raise for the first setting that is out of range: name -> (in range?, how to fix it)."""
        for name, (fine, fix) in bounds.items():
            if not fine:
                raise UserError(f"{self.name}'s {name} is {getattr(self, name)}", fix)

    @property
    def guided(self) -> bool:
        """Return True if guidance is part of the velocity that is learned."""
        return self.guidance != 1.0

    @abstractmethod
    def interval(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """(r, t), r <= t, both (B,): what is trained. All but ``share`` of the rows have no length."""

    @abstractmethod
    def target(self, average: AverageVelocity, over: Interval) -> Tensor:
        """Return the target of u(x, r, t) where the interval has a length, without a graph.

        Args:
            average: u as it is now.
            over: the intervals.

        Returns:
            (B, ...).
        """


def total_derivative(average: AverageVelocity, x: Tensor, r: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """Return du/dr along the flow, with the end t fixed: the derivative of u along (velocity, 1, 0) at (x, r, t).

    Geng et al. 2025 (arXiv:2505.13447), eq. 8. Exact (a Jacobian-vector product in forward mode), for about the price
    of two evaluations, and without a graph: it is part of a target.

    Args:
        average: u; it must be differentiable forwards (``latentflow.models.DiT`` is).
        x: (B, ...).
        r, t: start and end, scalars or (B,), floating point.
        velocity: shaped like ``x``: dx/dr there.

    Returns:
        (B, ...).
    """
    with torch.no_grad():
        # Contiguous: torch puts no tangent on an expanded tensor, whose elements share memory.
        start = x.contiguous(), r.contiguous()
        along = velocity.to(x.dtype).contiguous(), torch.ones_like(start[1])
        derivative: Tensor = torch.func.jvp(lambda y, s: average(y, s, t), start, along)[1]
    return derivative


def average_velocity_loss(
    output: Tensor, target: Tensor, power: float = 0.0, floor: float = AverageObjective.floor
) -> Tensor:
    """||u - target||^2, averaged over everything but the rows, under the adaptive weight.

    Args:
        output: (B, ...) the network's u(x, r, t).
        target: (B, ...) from the objective; no gradient flows into it.
        power, floor: of ``adaptive``.

    Returns:
        (B,), float32 or better.

    Raises:
        ValueError: the output is not shaped like the target.
    """
    if output.shape != target.shape:
        raise ValueError(
            f"the network returned shape {tuple(output.shape)} for a velocity of shape {tuple(target.shape)}: "
            "its out_channels must equal the latent channels"
        )
    dtype = compute_dtype(output, target)
    return adaptive((output.to(dtype) - target.detach().to(dtype)).square().flatten(1).mean(1), power, floor)


def adaptive(error: Tensor, power: float, floor: float = 1e-3) -> Tensor:
    """error / sg(error + floor)^power, row by row: sec. 4.3 of MeanFlow, after Geng et al. 2024 (arXiv:2406.14548).

    At power 1 every row pulls about equally hard, whatever its error: the gradient is that of its logarithm. Errors
    are means over elements here, where the paper has sums; ``floor`` counts accordingly.
    """
    if power == 0.0:
        return error
    return error / (error.detach() + floor) ** power


def folded_velocity(
    velocity: Tensor, conditional: Tensor, unconditional: Tensor, guidance: float, mixing: float = 0.0
) -> Tensor:
    """Return the guided velocity that replaces the sample's in the target, (B, ...), without a graph.

    Sec. 4.2 of MeanFlow (arXiv:2505.13447) and, for k, its appendix: w v + k u(x, r, r | condition) +
    (1 - w - k) u(x, r, r) with k = ``mixing`` and w = (1 - k) ``guidance``. The network then learns the flow of the
    velocity guided at scale ``guidance``, whatever k is: k only reduces the noise of the sample's velocity.

    Args:
        velocity: the sample's.
        conditional, unconditional: the network's own at length 0, under the condition and without it.
        guidance, mixing: of the objective's settings.
    """
    omega = (1.0 - mixing) * guidance
    guided = omega * velocity + mixing * conditional + (1.0 - omega - mixing) * unconditional
    return guided.detach()


def average_as_velocity(average: AverageVelocity, times: Tensor) -> Velocity:
    """Return the velocity whose Euler steps on the grid ``times`` are exact: x_t = x_r + (t - r) u(x_r, r, t).

    At r it is the average velocity from r to the next time of the grid; from the last time on, the velocity itself.
    So ``integrate(average_as_velocity(u, times), x, times, "euler")`` is MeanFlow's sampler (algorithm 2) with as many
    evaluations as steps, and everything that wraps a velocity (guidance, callbacks) wraps it.

    Raises:
        ValueError: the times do not increase. Average velocities lead towards the data only.
    """
    if times.ndim != 1 or not bool((times.diff() > 0).all()):
        raise ValueError(f"times must strictly increase, but are {times.tolist()}")
    return lambda x, r: average(x, r, next_time(times, r))


def next_time(times: Tensor, r: Tensor) -> Tensor:
    """Return the first of the increasing ``times`` after r, in the shape and dtype of r; r itself if there is none."""
    grid = times.to(r.device, time_dtype(r.device)).contiguous()
    index = torch.searchsorted(grid, r.to(grid) + _ROUNDING).clamp(max=len(grid) - 1)
    return torch.maximum(grid[index].to(r), r)
