"""Samplers: one step of the jump process from t to t_next. ``simulate`` takes the steps.

Each step evaluates the posterior once, draws a data token x1 for every position from it, and lets positions jump as the
path says given x1. With x1 drawn, a position has one target and one rate, and the chance of a jump by the method is

    euler         1 - exp(-h rate): the rate frozen at t,
    tau-leaping   h rate exp(-h rate): as many events as a Poisson number, and a position with several stays,
    exact         the integral over the step (``DiscretePath.leap``).

In one dimension, with the exact posterior, ``exact`` is exact for every path and any steps; in more, what is left is
that positions jump together which should wait for one another: of order 1 in the step. A new method is one function and
one line in ``SAMPLERS`` (table.py); the orders for masks are in ``orders.py``.

The step that ends at t = 1, where rates are infinite, sets every position to its x1, whatever the method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..tensors import Generators, uniform_like
from .categorical import Draw, Logits
from .paths import DiscretePath, Jump

#: The posterior as a sampler sees it: (x, t as a Python float) -> logits, checked.
Field: TypeAlias = Callable[[Tensor, float], Logits]
#: (field, x, t, t_next) -> x at t_next. Evaluates the field once at most, at t.
Step: TypeAlias = Callable[[Field, Tensor, float, float], Tensor]


#: (k, 1 - k) -> the clock of a corrector at k = ``path.progress``; see ``CORRECTORS``.
Corrector: TypeAlias = Callable[[Tensor, Tensor], Tensor]

#: Correctors by their clocks, the integral of c / (k (1 - k)) over k: its increase over a step is the mean number of
#: redraws of each token. It may be infinite at an end: then the token is redrawn for certain. c(k) is the strength, the
#: share of the divergence-free part, which is the forward less the backward velocity, k' / (k (1 - k)) to a draw from
#: p_t(. | x1): a token is taken to the data and made noise again. It leaves p_t alone, and lets tokens change that were
#: drawn too early. Gat et al. 2024 (arXiv:2407.15595).
CORRECTORS: dict[str, Corrector] = {
    # c(k) = k (1 - k): finite rates everywhere. One redraw of each token over the whole path, on average.
    "balanced": lambda k, rest: k,
    # c(k) = 1: rates infinite at both ends, where the source and the data are drawn again.
    "constant": lambda k, rest: k.log() - rest.log(),
}


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """Settings of one simulation."""

    path: DiscretePath
    strength: float  # factor on the corrector's share
    corrector: Corrector
    temperature: float
    generator: Generators


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """An entry of ``SAMPLERS``.

    Attributes:
        order: global order of convergence to the law of the process, in the step; 0 where a bias stays. A test holds
            every entry to it.
        start: makes the step function of one simulation; the variables that it closes over are its memory.
        masked: for the mask source only: it decides which masks are lifted next.
    """

    order: int
    start: Callable[[SamplerOptions], Step]
    masked: bool = False


def draw_data(logits: Logits, x: Tensor, uniform: Tensor, options: SamplerOptions) -> tuple[Tensor, Draw]:
    """Draw the data token x1 of every position from the posterior: (B, ...), and the draws of those not known."""
    positions = (~options.path.known(x)).flatten().nonzero()[:, 0]
    drawn = logits.draw(positions, uniform.flatten()[positions], options.temperature)
    return x.flatten().index_copy(0, positions, drawn.place).reshape(x.shape), drawn


def redraw(
    x: Tensor, x1: Tensor, t: float, t_next: float, uniforms: Tensor, options: SamplerOptions
) -> Tensor:
    """Apply the corrector's share of a step: redraw each token from p(. | x1) at t_next with its probability.

    The clock is integrated over the step, so that nothing is infinite where kappa is 0: the probability is 1 there.

    Args:
        uniforms: (2, B, ...): whether, and what.
    """
    if not options.strength:
        return x
    path, wide = options.path, torch.tensor([t, t_next], dtype=torch.float64)
    clock = options.corrector(path.progress(wide), path.remainder(wide))
    probability = -torch.expm1(-options.strength * clock.diff()).item()
    return torch.where(uniforms[0] < probability, path.draw(x1, t_next, uniforms[1]), x)


#: (path, x, x1, t, t_next, uniform) -> targets, and the probabilities of jumping there.
Transition: TypeAlias = Callable[[DiscretePath, Tensor, Tensor, float, float, Tensor], Jump]


def euler(path: DiscretePath, x: Tensor, x1: Tensor, t: float, t_next: float, uniform: Tensor) -> Jump:
    """1 - exp(-h rate): Campbell et al. 2024 (arXiv:2402.04997); Gat et al. 2024 (arXiv:2407.15595)."""
    target, rate = path.forward(x, x1, t, uniform)
    return Jump(target, -torch.expm1(-(t_next - t) * rate))


def tau_leaping(path: DiscretePath, x: Tensor, x1: Tensor, t: float, t_next: float, uniform: Tensor) -> Jump:
    """One event of a Poisson number with the mean h rate: Campbell et al. 2022 (arXiv:2205.14987), sec. 4.3."""
    target, rate = path.forward(x, x1, t, uniform)
    events = (t_next - t) * rate
    return Jump(target, events * torch.exp(-events))


def exact(path: DiscretePath, x: Tensor, x1: Tensor, t: float, t_next: float, uniform: Tensor) -> Jump:
    """The path's own step given x1, which is exact for a single position."""
    return path.leap(x, x1, t, t_next, uniform)


def jumps(transition: Transition) -> Sampler:
    """Return the sampler of a chance to jump: every position by itself."""

    def start(options: SamplerOptions) -> Step:
        def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
            u = uniform_like(x, options.generator, 5 if options.strength else 3)
            x1, _ = draw_data(field(x, t), x, u[0], options)
            if t_next == 1.0:
                return x1
            target, probability = transition(options.path, x, x1, t, t_next, u[1])
            return redraw(torch.where(u[2] < probability, target, x), x1, t, t_next, u[3:], options)

        return step

    return Sampler(order=1, start=start)
