"""Stochastic solvers: samplers with the marginals of the flow that draw fresh noise on the way.

All are built from one velocity evaluation per evaluation point: the score, the data and the noise that it
implies follow from it through the path. Each is a factory that returns a ``Solver``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latentflow.errors import UserError, lookup

from ..paths import Path
from ..predictions import convert
from ..tensors import time_dtype
from .base import Field, Solver, SolverOptions, Step
from .diffusions import DIFFUSIONS, Diffusion
from .runge_kutta import runge_kutta

_EULER = runge_kutta(1, nodes=[0], matrix=[[]], weights=[1])


def euler_maruyama(diffusion: str | Diffusion = "sigma", scale: float = 1.0) -> Solver:
    """Euler-Maruyama on dx = (u + g^2/2 score) dt + g dW: weak order 1, one evaluation per step.

    Ma et al. 2024 (SiT, arXiv:2401.08740), sec. 2. Backwards (data to noise) the score term changes its sign,
    so that the marginals are kept in that direction too. Where ``integrate`` is given a score, that is taken:
    with "constant" and the bridge's sigma as ``scale`` this samples [SF]2M (Tong et al. 2023,
    arXiv:2307.03672).

    Args:
        diffusion: a key of ``DIFFUSIONS``, or a function (path, t) -> g^2.
        scale: multiplies g; 0 is Euler's step of the ODE, bit for bit, and draws no random number.

    Raises:
        UserError: unknown diffusion (the nearest is suggested); scale negative or not finite. While
            sampling: g^2 is negative or not finite, or is not 0 where sigma is 0 (the score is infinite).
    """
    g_squared = _scaled(diffusion, scale)

    def start(options: SolverOptions) -> Step:
        sde, euler = _Sde(g_squared, options), _EULER.start(options)

        def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
            x_next = euler(sde.drift(field, backward=t_next < t), x, t, t_next)
            std = math.sqrt(abs(t_next - t) * sde.g_squared(t))
            return x_next + std * _normal(x, options) if scale else x_next

        return step

    return Solver(order=1, evaluations=1, start=start, stochastic=True)


@dataclass(frozen=True)
class _Sde:
    """dx = (u + g^2/2 score) dt + g dW, in the direction in which t runs."""

    diffusion: Diffusion | None  # None: the ODE
    options: SolverOptions

    def g_squared(self, t: float) -> float:
        if self.diffusion is None:
            return 0.0
        value = float(self.diffusion(self.options.path, torch.tensor(t, dtype=torch.float64)))
        if not 0.0 <= value < math.inf:
            raise UserError(
                f"the diffusion's g^2 is {value:g} at t = {t:g} on {self.options.path}",
                "Use another diffusion ('sigma' is finite everywhere), keep the times away from this t, or, "
                "for 'sbdm', the solver 'ddpm', which takes finite steps of the same process.",
            )
        return value

    def drift(self, field: Field, backward: bool) -> Field:
        """dx/dt without the noise. Reversed time turns the sign of u, not that of the score term."""
        if self.diffusion is None:
            return field
        sign = -1.0 if backward else 1.0

        def drift(x: Tensor, t: float) -> Tensor:
            velocity = field(x, t)
            return velocity + sign * self._score_term(velocity, x, t)

        return drift

    def _score_term(self, velocity: Tensor, x: Tensor, t: float) -> Tensor:
        """g^2/2 score = -(g^2 / (2 sigma)) x0_hat."""
        if self.options.score is not None:
            return (self.g_squared(t) / 2) * _given_score(x, t, self.options)
        sigma = _schedule(self.options.path, t)[1]
        if sigma > _TINY:
            factor = self.g_squared(t) / (2 * sigma)
        elif self.g_squared(t) > _TINY:
            raise UserError(
                f"the score is infinite at t = {t:g} (sigma = 0), where this diffusion's g^2 is "
                f"{self.g_squared(t):g}",
                "Use a diffusion that vanishes with sigma, such as 'sigma', or times that stay away from "
                f"t = {t:g}, for example up to 0.999.",
            )
        else:  # 0 / 0: the limit, from inside the interval
            inside = min(max(t, 1e-6), 1.0 - 1e-6)
            factor = self.g_squared(inside) / (2 * _schedule(self.options.path, inside)[1])
        return -factor * _noise_prediction(velocity, x, t, self.options.path)


_TINY = 1e-12  # rounding of a schedule that is 0: sin(pi), cos(pi / 2)


def _scaled(diffusion: str | Diffusion, scale: float) -> Diffusion | None:
    """scale^2 g^2, or None where that is the ODE."""
    function = lookup(DIFFUSIONS, diffusion, "diffusion") if isinstance(diffusion, str) else diffusion
    if not 0.0 <= scale < math.inf:
        raise UserError(f"diffusion scale {scale}", "Use a finite number from 0 (the ODE); 1 is usual.")
    return (lambda path, t: scale**2 * function(path, t)) if scale else None


def _schedule(path: Path, t: float) -> tuple[float, float]:
    """(alpha, sigma) at t, in float64."""
    time = torch.tensor(t, dtype=torch.float64)
    return float(path.alpha(time)), float(path.sigma(time))


def _noise_prediction(velocity: Tensor, x: Tensor, t: float, path: Path) -> Tensor:
    """E[x0 | x]; where alpha = 0, x = sigma x0 says it all, also on paths where the velocity does not."""
    alpha, sigma = _schedule(path, t)
    return x / sigma if alpha == 0 else convert(velocity, x, t, path, "velocity", "noise")


def _given_score(x: Tensor, t: float, options: SolverOptions) -> Tensor:
    assert options.score is not None
    value = options.score(x, torch.tensor(t, dtype=time_dtype(x.device), device=x.device))
    if value.shape != x.shape:
        raise ValueError(
            f"the score returned shape {tuple(value.shape)}, but must keep the shape of x, {tuple(x.shape)}"
        )
    if not bool(torch.isfinite(value).all()):
        raise UserError(
            f"the score at t = {t:g} is not finite",
            "Keep the times away from this t, or look at the network that predicts it.",
        )
    return value.to(x.dtype)


def _normal(x: Tensor, options: SolverOptions) -> Tensor:
    """Standard normal numbers like x, drawn on the generator's device."""
    device = x.device if options.generator is None else options.generator.device
    return torch.randn(x.shape, generator=options.generator, dtype=x.dtype, device=device).to(x.device)
