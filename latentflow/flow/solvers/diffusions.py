"""The noise that a stochastic sampler adds: the squared diffusion coefficient g^2(t).

dx = (u + g^2/2 score) dt + g dW has the marginals of dx/dt = u for every g, which is therefore chosen when
sampling. Ma et al. 2024 (SiT, arXiv:2401.08740), sec. 2, whose w is g^2. A new schedule is one function and
one line in ``DIFFUSIONS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ..paths import Path

#: (path, t) -> g^2 at t, elementwise, before the solver's ``scale``^2. Not negative.
Diffusion: TypeAlias = Callable[[Path, Tensor], Tensor]


def constant(path: Path, t: Tensor) -> Tensor:
    """g = 1. Where sigma(1) = 0 the score term grows without bound towards t = 1."""
    return torch.ones_like(t)


def sigma(path: Path, t: Tensor) -> Tensor:
    """g^2 = 2 sigma: the score term is minus the predicted noise, finite at both ends of every path."""
    return 2.0 * path.sigma(t)


def sbdm(path: Path, t: Tensor) -> Tensor:
    """The reverse-time SDE's own, g^2 = 2 (alpha'/alpha sigma^2 - sigma sigma').

    Song et al. 2021 (arXiv:2011.13456), eq. 6, on any path. Infinite where alpha = 0: at t = 0 on all but
    the variance-preserving and variance-exploding paths.
    """
    c = path.at(t, t)
    return 2.0 * (c.d_alpha / c.alpha * c.sigma**2 - c.sigma * c.d_sigma)


def linear(path: Path, t: Tensor) -> Tensor:
    """g^2 = 2 (1 - t)."""
    return 2.0 * (1.0 - t)


def decreasing(path: Path, t: Tensor) -> Tensor:
    """g^2 = 2 ((1 + cos(pi t)) / 2)^2."""
    return 0.5 * (1.0 + torch.cos(math.pi * t)) ** 2


def increasing_decreasing(path: Path, t: Tensor) -> Tensor:
    """g^2 = 2 sin^2(pi t): none at the ends."""
    return 2.0 * torch.sin(math.pi * t) ** 2


DIFFUSIONS: dict[str, Diffusion] = {
    "constant": constant,
    "sigma": sigma,
    "sbdm": sbdm,
    "linear": linear,
    "decreasing": decreasing,
    "increasing-decreasing": increasing_decreasing,
}
