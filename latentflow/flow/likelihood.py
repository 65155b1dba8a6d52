"""The exact log-density of data under a flow, by the instantaneous change of variables.

Along dx/dt = v(x, t) the density obeys d/dt log p_t(x_t) = -div v(x_t, t), so

    log p_1(x_1) = log p_0(x_0) - int_0^1 div v(x_t, t) dt,

with x_t followed back from x_1. Chen et al. 2018 (arXiv:1806.07366), theorem 1; Grathwohl et al. 2018
(FFJORD, arXiv:1810.01367), eq. 4 and 8; for diffusions Song et al. 2020 (arXiv:2011.13456), eq. 39-40.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UserError, lookup
from .solvers import Solver, Times, find_solver, integrate
from .tensors import Generators, Velocity, compute_dtype, paired, require_graph, with_time_rows
from .times import checked_times

#: Makes the vectors e, in chunks (n, B, ...), whose e . (dv/dx) e add up to the divergence times a constant.
Vectors: TypeAlias = Callable[[], Iterable[Tensor]]


def log_likelihood(
    velocity: Velocity,
    x1: Tensor,
    divergence: str = "exact",
    *,
    probes: int = 1,
    probe: str = "rademacher",
    solver: str | Solver = "dopri5",
    times: Times = (1.0, 0.0),
    rtol: float = 1e-5,
    atol: float = 1e-5,
    generator: Generators = None,
    log_source: Callable[[Tensor], Tensor] | None = None,
    chunk_size: int = 32,
    differentiable: bool = False,
) -> Tensor:
    """Return log p_1(x1) in nats, integrating the state and its log-density together, from data to noise.

    Args:
        velocity: (x, t) -> dx/dt, differentiable in x or independent of it, each row depending on its own row of x
            alone (no batch statistics). It gets x in the dtype of x1; attention runs by torch's unfused kernel.
        x1: (B, D), (B, C, H, W) or any (B, ...), floating point: in the network's space, so latents for a latent flow.
        divergence: "exact": the trace of the Jacobian, D vector products for each evaluation; or "hutchinson": the
            mean of e . (dv/dx) e over random e, an unbiased estimate but for the solver's error.
        probes: for "hutchinson": random vectors e for each row, drawn once for the whole integration, so that an
            adaptive solver sees a smooth field.
        probe: for "hutchinson": "rademacher" (+-1; exact where the Jacobian is diagonal) or "gaussian".
        solver, rtol, atol: as in ``integrate``; a fixed-step solver wants a finer ``times``.
        times: from 1 down to 0. Where the velocity is singular at an end, stop short of it, (1 - 1e-4, 0) say.
        generator: for "hutchinson": decides the probes; a list with one for each row makes every row independent of
            the others.
        log_source: x at times[-1], (B, ...), -> its log-density (B,); default standard normal. A source of
            another scale (variance exploding) needs it.
        chunk_size: vector products at a time; memory grows with it, and speed.
        differentiable: keep the graph, to x1 and to the velocity's parameters; memory grows with every evaluation.

    Returns:
        (B,), float32 or better.

    Raises:
        UserError: unknown divergence, probe or solver (the nearest is suggested); a stochastic solver; a velocity
            that depends on x without a graph; values not finite; times that do not decrease.
        ValueError: x1 is not floating point (B, ...); probes or chunk_size < 1; wrong shapes; not one generator for
            each row.
    """
    if x1.ndim < 2 or not x1.is_floating_point():
        raise ValueError(
            f"x1 is {tuple(x1.shape)}, {x1.dtype}: pass floating-point rows, (B, D) or (B, C, H, W)"
        )
    for name, count in (("probes", probes), ("chunk_size", chunk_size)):
        if count < 1:
            raise ValueError(f"{name} is {count}: pass at least 1")
    grid = checked_times(times)
    if not grid[0] > grid[-1]:
        raise UserError(
            f"times run from {grid[0]:g} to {grid[-1]:g}", "Pass decreasing times, from data to noise."
        )
    solver = find_solver(solver, "no density follows from its trajectories")
    draw = lookup(PROBES, probe, "probe")
    divergences = {
        "exact": lambda: _unit_vectors(x1, chunk_size),
        "hutchinson": lambda: _random_vectors(x1, probes, draw, generator, chunk_size),
    }
    vectors = lookup(divergences, divergence, "divergence")()
    share = 1.0 / probes if divergence == "hutchinson" else 1.0

    velocity = with_time_rows(velocity)

    def augmented(state: Tensor, t: Tensor) -> Tensor:  # (B, D + 1): x, and the integral of the divergence
        x = state[:, :-1].reshape(x1.shape).to(x1.dtype)
        v, trace = _velocity_and_trace(velocity, x, t, vectors, differentiable)
        return torch.cat([v.to(state).flatten(1), share * trace[:, None].to(state)], 1)

    with torch.set_grad_enabled(differentiable):
        x = x1.to(compute_dtype(x1)).flatten(1)
        state = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
        state = integrate(augmented, state, grid, solver, rtol=rtol, atol=atol)
        # The integral ran from 1 to 0: it is minus the one from 0 to 1.
        log_p0 = (log_source or _standard_normal)(state[:, :-1].reshape(x1.shape))
        if log_p0.shape != state.shape[:1]:
            raise ValueError(
                f"log_source returned shape {tuple(log_p0.shape)} for {len(x)} rows: sum over the elements"
            )
        return log_p0 + state[:, -1]


def bits_per_dim(log_likelihood: Tensor, shape: int | Sequence[int]) -> Tensor:
    """-log2 p(x) / D: the density of x as given to ``log_likelihood``, in bits per dimension of x.

    For a latent flow that is the density of latents, normalised as they are: not of images. It is not comparable
    with the bits per dimension of pixels in the literature, nor between two autoencoders or two normalisations.

    Args:
        log_likelihood: in nats, any shape.
        shape: of one row, without the batch (``x1.shape[1:]``), or its number of elements D.

    Raises:
        ValueError: D < 1.
    """
    dimensions = shape if isinstance(shape, int) else math.prod(shape)
    if dimensions < 1:
        raise ValueError(f"shape {shape} has {dimensions} dimensions: pass the shape of one row")
    return -log_likelihood / (dimensions * math.log(2.0))


def _velocity_and_trace(
    velocity: Velocity, x: Tensor, t: Tensor, vectors: Vectors, differentiable: bool
) -> tuple[Tensor, Tensor]:
    """Return v(x, t), and (B,) the sum of e . (dv/dx) e over ``vectors``, by vector-Jacobian products.

    The rows are independent, so one product gives e (dv/dx) for every row at once.
    """
    if not (differentiable and x.requires_grad):
        x = x.detach().requires_grad_()
    # The fused attention kernels have no second derivative, and their first is not batched.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        v = velocity(x, t)
    if v.shape != x.shape:
        raise ValueError(
            f"the velocity returned shape {tuple(v.shape)}, but must keep that of x, {tuple(x.shape)}"
        )
    trace = torch.zeros(len(x), dtype=compute_dtype(x), device=x.device)
    for e in vectors():
        products = _products(v, x, e, differentiable) if v.requires_grad else None
        if products is None:
            require_graph(v, lambda at: velocity(at, t), x, "divergence")
            break
        trace = trace + (products.to(trace) * e.to(trace)).flatten(2).sum((0, 2))
    return (v if differentiable else v.detach()), trace


def _products(v: Tensor, x: Tensor, e: Tensor, differentiable: bool) -> Tensor | None:
    """Return e (dv/dx) for each of the (n, B, ...) vectors ``e``; None where no graph leads from v to x."""
    options: dict[str, bool] = {
        "retain_graph": True,
        "create_graph": differentiable,
        "allow_unused": True,
    }
    if not differentiable:
        return torch.autograd.grad(v, x, e, is_grads_batched=True, **options)[0]
    # One by one: torch before 2.14 cannot differentiate the batched gradient of attention.
    products = [torch.autograd.grad(v, x, probe, **options)[0] for probe in e]
    return None if products[0] is None else torch.stack(products)


def _unit_vectors(x: Tensor, chunk_size: int) -> Vectors:
    """All e_1, ..., e_D, the same for every row: the sum is the trace itself."""

    def vectors() -> Iterator[Tensor]:  # made when needed: all of them together are D x D
        for indices in torch.arange(x[0].numel(), device=x.device).split(chunk_size):
            units = torch.nn.functional.one_hot(indices, x[0].numel()).to(x.dtype)
            yield units.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)

    return vectors


Probe: TypeAlias = Callable[[Tensor, torch.Generator | None], Tensor]

#: Name -> random numbers of mean 0 and variance 1 in the place of a tensor's.
PROBES: dict[str, Probe] = {
    "rademacher": lambda e, generator: e.bernoulli_(0.5, generator=generator) * 2.0 - 1.0,
    "gaussian": lambda e, generator: e.normal_(generator=generator),
}


def _random_vectors(x: Tensor, probes: int, draw: Probe, generator: Generators, chunk_size: int) -> Vectors:
    """``probes`` random e for every row: the mean has the trace as its expectation. Hutchinson 1989."""

    def drawn(shape: torch.Size, source: torch.Generator | None) -> Tensor:
        return draw(torch.empty(probes, *shape, device=source.device if source else x.device), source)

    if isinstance(generator, Sequence):
        e = torch.stack([drawn(row.shape, source) for row, source in paired(x, generator)], 1)
    else:
        e = drawn(x.shape, generator)
    chunks = e.to(x.device, x.dtype).split(chunk_size)
    return lambda: chunks


def _standard_normal(x: Tensor) -> Tensor:
    return -0.5 * (x.square() + math.log(2.0 * math.pi)).flatten(1).sum(1)
