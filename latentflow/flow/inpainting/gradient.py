"""The hole is guided by the gradient of how well the predicted data meet what is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..paths import Path
from ..predictions import convert
from ..solvers import Solver
from ..solvers.base import schedule
from ..tensors import Generators, Velocity
from .base import Callback, Known, Progress, Times, prepare


def ot_ode(
    velocity: Velocity,
    x0: Tensor,
    known: Tensor,
    mask: Tensor,
    times: Times,
    *,
    solver: str | Solver | None = None,
    scale: float = 1.0,
    path: Path | None = None,
    generator: Generators = None,
    callback: Callback | None = None,
    progress: Progress = False,
) -> Tensor:
    """Replacement, and the predicted data in the hole are moved by the gradient through the network.

    OT-ODE, Pokle et al. 2023 (arXiv:2310.04432), algorithm 1 with gamma = ``scale``; on any path PiGDM, Song et al.
    2023 (ICLR, "Pseudoinverse-guided diffusion models"). The data given x_t are taken as N(D, r^2), D the predicted
    data and r^2 = sigma^2 / (sigma^2 + alpha^2) as for data N(0, 1); then D moves by

        (sigma^2 / alpha) d/dx log N(known; D there, r^2),

    and the velocity with it: exact for data N(0, 1), an approximation elsewhere. The known region is held
    on its way as ``replacement`` does it. At t = 0, where D does not depend on x, nothing is moved.

    Cost: as many evaluations as the solver takes without a mask, each with a gradient through the network (about three
    forward passes in all).

    Args:
        velocity: as ``repaint``, and differentiable in x.
        x0, known, mask, times, path, generator, callback, progress: as ``repaint``.
        solver: any; default "euler".
        scale: multiplies the shift; 0 is ``replacement``.

    Returns, Raises: as ``repaint``.
    """
    task = prepare(velocity, x0, known, mask, times, path, generator, callback, progress)
    noise = task.known.noise(task.x, task.times[0])

    def guided(x: Tensor, t: Tensor) -> Tensor:
        (alpha, sigma), c = schedule(task.known.path, float(t)), task.known.path.at(t, x)
        if sigma == 0.0:  # the data are x, and the known region is there
            return task.velocity(x, t)
        ahead = look_ahead(lambda y: task.velocity(y, t), task.known, x, float(t))
        return ahead.velocity + scale * (c.d_alpha - c.d_sigma * alpha / sigma) * ahead.shift

    return task.follow(solver or "euler", lambda x, t: task.known.hold(x, noise, t), velocity=guided)


class Ahead(NamedTuple):
    """At (x, t): the velocity and predicted data, the ``shift`` of the data towards what is known, all (B, ...), and
    log N(known; data there, r^2), (B,), without its constant."""

    velocity: Tensor
    data: Tensor
    shift: Tensor
    log_likelihood: Tensor


def look_ahead(velocity: Callable[[Tensor], Tensor], known: Known, x: Tensor, t: float) -> Ahead:
    """One evaluation and its gradient, at a t where sigma is not 0."""
    alpha, sigma = schedule(known.path, t)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = velocity(x)
        data = convert(v, x, t, known.path, "velocity", "data")
        error = known.put(torch.zeros_like(data), known.values - data)
        log = -0.5 * (sigma**2 + alpha**2) / sigma**2 * error.square().flatten(1).sum(1)
        (gradient,) = torch.autograd.grad(log.sum(), x)
    shift = sigma**2 / alpha * gradient if alpha > 0.0 else torch.zeros_like(gradient)
    return Ahead(v.detach(), data.detach(), shift, log.detach())
