"""Average velocities: one network evaluation takes x from any time to any later one.

MeanFlow, Geng et al. 2025 (arXiv:2505.13447), with their t and r turned round, because our t = 1 is data: an interval
starts at r, nearer the noise, and ends at t. Where phi follows the flow from r to t,

    u(x_r, r, t) = (phi(x_r) - x_r) / (t - r),        u(x, r, r) = v(x, r).

Differentiating (t - r) u = int_r^t v by r along the flow, with the end t fixed, gives the identity that is trained
(their eq. 6):

    u = v + (t - r) du/dr,        du/dr = (v . grad_x) u + (partial u / partial r).

``slope`` is du/dr, one forward-mode derivative, and ``mean_flow_loss`` the identity as a regression::

    velocity = sample.velocity                                       # or ``folded_velocity``: guidance, learned along
    du = slope(network, sample.xt, sample.t, end, velocity)          # network(x, r, t) -> average velocity
    loss = mean_flow_loss(network(sample.xt, sample.t, end), sample, end=end, slope=du).mean()

and sampling is ``integrate(chords(network, times), x0, times, "euler")``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from latentflow.errors import UserError

from .paths import PathSample
from .tensors import Velocity, compute_dtype, expand_t

#: u(x, r, t): x (B, ...), r and t scalar tensors or (B,), r <= t; the result is shaped like x.
AverageVelocity: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]

# Times of a grid in float64 and the same in a network's float32 are the same time.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class MeanFlow:
    """The settings of the objective "mean-flow"; the defaults are those of the paper's ablations (its table 1).

    Attributes:
        share: of the samples whose interval has a length; the others train the velocity itself. In (0, 1].
        power: p of the adaptive weight, see ``adaptive``. 0 is the plain squared error, 1 the paper's.
        guidance: scale of the classifier-free guidance that is learned along, so that a guided sample costs one
            evaluation; 1 is none.
        mixing: kappa of ``folded_velocity``, in [0, 1): how much of the guided velocity is the network's own.
        improved: 1 takes du/dr along the network's velocity u(x, r, r) instead of the sample's, which is that of one
            pair (noise, data) and therefore far noisier: improved MeanFlow, Geng et al. 2025 (arXiv:2512.02012),
            sec. 4. One more evaluation, without a gradient, of the samples whose interval has a length.

    Raises:
        UserError: a value outside its bounds.
    """

    share: float = 0.25
    power: float = 1.0
    guidance: float = 1.0
    mixing: float = 0.0
    improved: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "share": (0.0 < self.share <= 1.0, "Use more than 0, up to 1; 0.25 is usual."),
            "power": (0.0 <= self.power <= 2.0, "Use 0 to 2; 1 is usual."),
            "guidance": (0.0 < self.guidance < float("inf"), "Use 1 for none; 2 to 4 are usual."),
            "mixing": (0.0 <= self.mixing < 1.0, "Use 0 to below 1; 0 is simplest."),
            "improved": (self.improved in (0, 1), "Use 0 or 1."),
        }
        for name, (fine, fix) in bounds.items():
            if not fine:
                raise UserError(f"mean-flow's {name} is {getattr(self, name)}", fix)

    @property
    def guided(self) -> bool:
        """Whether guidance is folded into what is learned."""
        return self.guidance != 1.0

    def interval(self, first: Tensor, second: Tensor, coin: Tensor) -> tuple[Tensor, Tensor]:
        """(r, t), r <= t, both (B,), of two training times and a uniform number for each row.

        Sec. 4.3, "Sampling r, t": the times are put in order, and all but ``share`` of the rows are left without a
        length, at the one nearer the noise.
        """
        start, end = torch.minimum(first, second), torch.maximum(first, second)
        return start, torch.where(coin < self.share, end, start)


def slope(average: AverageVelocity, x: Tensor, r: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """du/dr along the flow, with the end t fixed: the derivative of u along (velocity, 1, 0) at (x, r, t).

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


def mean_flow_loss(
    output: Tensor,
    sample: PathSample,
    *,
    end: Tensor,
    slope: Tensor,
    velocity: Tensor | None = None,
    power: float = 1.0,
    floor: float = 1e-3,
) -> Tensor:
    """||u - sg(v + (t - r) du/dr)||^2, averaged over everything but the rows, under the adaptive weight.

    Geng et al. 2025 (arXiv:2505.13447), eqs. 9 and 10; sg stops the gradient. Where t = r it is flow matching.

    Args:
        output: (B, ...) the network's u(x, r, t) at x = ``sample.xt``, r = ``sample.t`` and t = ``end``.
        sample: from ``path.sample``.
        end: (B,) or a scalar, the end of the interval, not before ``sample.t``.
        slope: (B, ...) du/dr, from the function of that name.
        velocity: (B, ...) what v is; default: ``sample.velocity``. With guidance ``folded_velocity``.
        power, floor: of ``adaptive``.

    Returns:
        (B,), float32 or better.

    Raises:
        ValueError: the output is not shaped like the velocity; an interval ends before it starts.
    """
    v = sample.velocity if velocity is None else velocity
    if not output.shape == v.shape == slope.shape:
        raise ValueError(
            f"the network returned shape {tuple(output.shape)} and slope {tuple(slope.shape)} for a velocity of shape "
            f"{tuple(v.shape)}: its out_channels must equal the latent channels"
        )
    dtype = compute_dtype(output, v, slope)
    length = (expand_t(end, v) - expand_t(sample.t, v)).to(dtype)
    if bool((length < 0).any()):
        raise ValueError("an interval ends before it starts: end must be at least sample.t (t = 1 is data)")
    target = (v + length * slope).detach()
    return adaptive((output.to(dtype) - target.to(dtype)).square().flatten(1).mean(1), power, floor)


def adaptive(error: Tensor, power: float, floor: float = 1e-3) -> Tensor:
    """error / sg(error + floor)^power, row by row: sec. 4.3 of MeanFlow, after Geng et al. 2024 (arXiv:2406.14548).

    At power 1 every row pulls about equally hard, whatever its error: the gradient is that of its logarithm. Errors
    are means over elements here, where the paper has sums; ``floor`` counts accordingly.
    """
    if power == 0.0:
        return error
    return error / (error.detach() + floor) ** power


def folded_velocity(
    velocity: Tensor, conditional: Tensor, unconditional: Tensor, settings: MeanFlow
) -> Tensor:
    """The guided velocity that takes the place of the sample's in the target, (B, ...), without a graph.

    Sec. 4.2 of MeanFlow and, for k, its appendix: w v + k u(x, r, r | condition) + (1 - w - k) u(x, r, r) with
    k = ``mixing`` and w = (1 - k) ``guidance``. What the network then learns is the flow of the velocity guided at
    scale ``guidance``, whatever k is: k only takes from the noise of the sample's velocity.

    Args:
        velocity: the sample's.
        conditional, unconditional: the network's own at length 0, under the condition and without it.
        settings: guidance and mixing.
    """
    kappa = settings.mixing
    omega = (1.0 - kappa) * settings.guidance
    guided = omega * velocity + kappa * conditional + (1.0 - omega - kappa) * unconditional
    return guided.detach()


def chords(average: AverageVelocity, times: Tensor) -> Velocity:
    """The velocity whose Euler steps on the grid ``times`` are exact: x_t = x_r + (t - r) u(x_r, r, t).

    At r it is the average velocity from r to the next time of the grid; from the last time on, the velocity itself.
    So ``integrate(chords(u, times), x, times, "euler")`` is the sampler of MeanFlow (algorithm 2) with as many
    evaluations as steps, and everything that wraps a velocity (guidance, callbacks) wraps it.

    Raises:
        ValueError: the times do not increase. Average velocities lead towards the data only.
    """
    if times.ndim != 1 or not bool((times.diff() > 0).all()):
        raise ValueError(f"times must strictly increase, but are {times.tolist()}")
    return lambda x, r: average(x, r, next_time(times, r))


def next_time(times: Tensor, r: Tensor) -> Tensor:
    """The first of the increasing ``times`` after r, shaped and typed like r; r itself where there is none."""
    grid = times.to(r.device, torch.float64 if r.device.type != "mps" else torch.float32).contiguous()
    index = torch.searchsorted(grid, r.to(grid) + _ROUNDING).clamp(max=len(grid) - 1)
    return torch.maximum(grid[index].to(r), r)
