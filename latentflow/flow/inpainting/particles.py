"""Guided particles, weighted and resampled: this method tends to the conditional distribution itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import UserError
from ..predictions import convert
from ..solvers.base import Field, SolverOptions, Step, schedule
from ..tensors import Generators, normal_like, require_graph
from .base import InpaintProblem, KnownRegion


def twisted(problem: InpaintProblem, *, particles: int = 1) -> Tensor:
    """Take stochastic steps guided by the gradient through the network, and correct their errors by weights.

    The Twisted Diffusion Sampler, Wu et al. 2023 (arXiv:2306.17775), algorithm 1, for a velocity. The twist is
    psi(x, t) = N(known; predicted data there, r^2) with r^2 = sigma^2 / (sigma^2 + alpha^2). A step p(x' | x) of
    the solver "ddpm" is moved by the gradient of log psi, which makes it q(x' | x), and weighted with

        psi(x', t') p(x' | x) / (psi(x, t) q(x' | x)).

    Where the effective number of particles falls below half of them, and in the last step, they are drawn anew by
    their weights (systematically). With more particles the rows tend to the conditional distribution of ddpm's
    model, with more steps that to p(hole | known), which no other method does; the variance of the modes' shares is
    several times that of independent samples. In many dimensions the weights favour one particle, and the rows end as
    near copies of it. Alone, a particle is guided as in OT-ODE, Pokle et al. 2023 (arXiv:2310.04432).

    Cost: len(times) - 1 evaluations, each with a gradient through the network (about three forward passes in all).

    The velocity must be differentiable in x, or not depend on it. Rows that belong to one image are samples, but not
    independent ones: they depend on each other's generators.

    Args:
        particles: number of consecutive rows that belong to one image (as the images of one prompt follow one another),
            with the same known values and mask. 1: each row for itself, guided but not weighted.

    Raises:
        UserError: the rows cannot be divided so, or differ in what is known.
    """
    _require_alike(problem.known, problem.x, particles)
    return problem.take_steps(_twisted_steps(problem.known, particles, problem.times[-1]))


def _twisted_steps(known: KnownRegion, particles: int, last: float) -> Callable[[SolverOptions], Step]:
    def start(options: SolverOptions) -> Step:
        path = options.path
        # Between two steps it lacks log psi at the point that the last one reached: the next step adds it.
        log_weight: Tensor | float = 0.0

        def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
            nonlocal log_weight
            (alpha, sigma), (alpha_next, sigma_next) = schedule(path, t), schedule(path, t_next)
            ahead = look_ahead(lambda y: field(y, t), known, x, t)
            log_weight = log_weight + ahead.log_likelihood
            rows, log_weight = _resampled(log_weight, particles, t_next == last, options.generator)
            x, v, data, shift, log_psi = (value[rows] for value in (x, *ahead))
            noise = convert(v, x, t, path, "velocity", "noise")
            if sigma_next == 0.0:
                return alpha_next * data
            kept = alpha * sigma_next / (alpha_next * sigma)  # the share of the noise, as in ddpm
            deviation = sigma_next * math.sqrt(1.0 - kept**2)
            # The data move by the shift, the noise by -alpha/sigma of it, so that they still make x.
            moved = (alpha_next - sigma_next * kept * alpha / sigma) * shift
            random = deviation * normal_like(x, options.generator)
            ratio = random.square() - (random + moved).square()  # of p to q
            log_weight = log_weight - log_psi + 0.5 / deviation**2 * ratio.flatten(1).sum(1)
            return alpha_next * data + sigma_next * kept * noise + moved + random

        return step

    return start


def _resampled(
    log_weight: Tensor, particles: int, always: bool, generator: Generators
) -> tuple[Tensor, Tensor]:
    """Return the rows (B,) that go on, drawn by their log weights (B,), and their new ones: 0 where they were drawn."""
    groups = log_weight.double().reshape(-1, particles)
    share = groups.softmax(1)
    few = (share.square().sum(1) * particles > 2.0)[:, None] | always
    one_each = generator[::particles] if isinstance(generator, Sequence) else generator
    offset = torch.special.ndtr(normal_like(groups[:, :1], one_each))  # uniform
    places = (torch.arange(particles, device=share.device) + offset) / particles
    drawn = torch.searchsorted(share.cumsum(1), places).clamp(max=particles - 1)
    stay = torch.arange(particles, device=share.device).expand_as(drawn)
    first = torch.arange(0, log_weight.numel(), particles, device=share.device)[:, None]
    rows = (first + torch.where(few, drawn, stay)).flatten()
    return rows, torch.where(few, 0.0, groups).flatten().to(log_weight)


def _require_alike(known: KnownRegion, x: Tensor, particles: int) -> None:
    if particles < 1 or len(x) % particles:
        raise UserError(
            f"{len(x)} rows cannot be divided into runs of {particles} particles",
            "Draw a multiple of `particles` images of each image.",
        )
    for value in (known.values, known.hole.expand_as(x)):
        runs = value.unflatten(0, (-1, particles))
        if not torch.equal(runs, runs[:, :1].expand_as(runs)):
            raise UserError(
                f"the {particles} rows that belong to one image differ in their known values or masks",
                "Let the rows of an image follow one another, or use particles=1.",
            )


class LookAhead(NamedTuple):
    """Values at (x, t): the velocity and predicted data, the ``shift`` of the data towards what is known, all
    (B, ...), and log N(known; data there, r^2), (B,), without its constant."""

    velocity: Tensor
    data: Tensor
    shift: Tensor
    log_likelihood: Tensor


def look_ahead(velocity: Callable[[Tensor], Tensor], known: KnownRegion, x: Tensor, t: float) -> LookAhead:
    """Evaluate the velocity once, with its gradient, at a t where sigma is not 0.

    Raises:
        UserError: the velocity depends on x without a graph.
    """
    alpha, sigma = schedule(known.path, t)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = velocity(x)
        if not v.requires_grad:
            require_graph(v, velocity, x, "gradient")
        data = convert(v, x, t, known.path, "velocity", "data")
        error = known.put(torch.zeros_like(data), known.values - data)
        log = -0.5 * (sigma**2 + alpha**2) / sigma**2 * error.square().flatten(1).sum(1)
        (gradient,) = torch.autograd.grad(log.sum(), x)
    shift = sigma**2 / alpha * gradient if alpha > 0.0 else torch.zeros_like(gradient)
    return LookAhead(v.detach(), data.detach(), shift, log.detach())
