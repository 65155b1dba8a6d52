"""Stochastic solvers: samplers with the marginals of the flow that draw fresh noise on the way.

All are built from one velocity evaluation per evaluation point: the score, the data and the noise that it
implies follow from it through the path. Each is a factory that returns a ``Solver``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UserError, lookup
from ..paths import Path
from ..predictions import convert
from ..tensors import Generators, Velocity, normal_like
from .base import EULER, HEUN, Field, Solver, SolverOptions, Step, schedule
from .diffusions import DIFFUSIONS, Diffusion


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
    return _sde_solver(EULER, (1.0, 0.0), diffusion, scale)


def stochastic_heun(diffusion: str | Diffusion = "sigma", scale: float = 1.0) -> Solver:
    """Heun's predictor-corrector on the same equation: weak order 2, two evaluations per step.

    The increment of the noise is the same in both stages, its variance the trapezoid of g^2. The moments of a
    step then agree with those of the exact solution up to O(h^3), since g does not depend on x: the
    conditions for weak order 2 of Kloeden & Platen 1992 (Numerical Solution of Stochastic Differential
    Equations), sec. 14.2. It evaluates at the last time too, where not every diffusion is finite.

    Args:
        diffusion, scale: as in ``euler_maruyama``; scale 0 is Heun's step of the ODE, bit for bit.

    Raises:
        UserError: as ``euler_maruyama``.
    """
    return _sde_solver(HEUN, (0.5, 0.5), diffusion, scale)


def ddpm(eta: float = 1.0) -> Solver:
    """Ancestral sampling from q(x_s | x_t, x1) at the predicted data x1, on any path: weak order 1.

    Ho et al. 2020 (arXiv:2006.11239), eq. 6-7, for eta = 1; Song et al. 2021 (DDIM, arXiv:2010.02502), eq. 12
    and 16, between. With k = alpha_t sigma_s / (alpha_s sigma_t) the share of the noise that is kept,

        x_s = alpha_s x1 + sigma_s (sqrt(1 - eta^2 (1 - k^2)) x0 + eta sqrt(1 - k^2) z),  z ~ N(0, 1).

    Backwards (data to noise) k is its inverse and eta = 1 the exact noising, which needs no network.

    Args:
        eta: 0 is DDIM, deterministic: Euler's step on the straight path; 1 the posterior of the diffusion.

    Raises:
        UserError: eta is not in [0, 1]; or ``integrate`` is given a score.
    """
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta {eta} of the solver 'ddpm'", "Use 0 (DDIM, deterministic) to 1 (DDPM).")

    def start(options: SolverOptions) -> Step:
        _refuse_score("ddpm", options)
        path = options.path

        def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
            velocity = field(x, t)
            data, noise = (convert(velocity, x, t, path, "velocity", end) for end in ("data", "noise"))
            (alpha, sigma), (alpha_next, sigma_next) = schedule(path, t), schedule(path, t_next)
            shares = alpha * sigma_next, alpha_next * sigma
            fresh = eta * math.sqrt(1.0 - (min(shares) / max(shares)) ** 2)
            x_next = alpha_next * data + (sigma_next * math.sqrt(1.0 - fresh**2)) * noise
            return x_next + (sigma_next * fresh) * normal_like(x, options.generator) if eta else x_next

        return step

    return Solver(order=1, evaluations=1, start=start, stochastic=True)


def churn(amount: float = 10.0, interval: tuple[float, float] = (0.0, 1.0), solver: Solver = HEUN) -> Solver:
    """Add noise, which leads back to a lower log-SNR; from there take a step of an ODE ``solver`` to t_next.

    Karras et al. 2022 (EDM, arXiv:2206.00364), algorithm 2, on any path: sigma/alpha, their noise level, grows
    by the factor 1 + min(amount |t_next - t|, sqrt(2) - 1). Their S_noise is 1, which keeps the marginals.
    It never leads back before times[0] (backwards: not beyond t_next).

    Args:
        amount: their S_churn (on a uniform grid); 0 is the ODE solver, bit for bit.
        interval: (low, high) in t: churn where low <= t <= high; their S_tmax and S_tmin.
        solver: a one-step method; the weak order is its own. Default: Heun.

    Raises:
        UserError: amount is negative or not finite; the interval is not 0 <= low <= high <= 1; or
            ``integrate`` is given a score.
    """
    low, high = interval
    if not 0.0 <= amount < math.inf:
        raise UserError(f"churn {amount}", "Use a finite number from 0 (the ODE solver); 5 to 80 are usual.")
    if not 0.0 <= low <= high <= 1.0:
        raise UserError(f"churn interval ({low}, {high})", "Use 0 <= low <= high <= 1 (t = 1 is data).")

    def start(options: SolverOptions) -> Step:
        _refuse_score("churn", options)
        ode_step, first = solver.start(options), math.inf

        def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
            nonlocal first
            first = min(first, t)
            growth = min(amount * abs(t_next - t), math.sqrt(2.0) - 1.0) if low <= t <= high else 0.0
            if growth > 0.0:
                back = max(_lower_snr(options.path, t, growth), first if t < t_next else t_next)
                if back < t:  # otherwise x is pure noise already, or pure data
                    x, t = renoise(x, t, back, options.path, options.generator), back
            return ode_step(field, x, t, t_next)

        return step

    return Solver(order=solver.order, evaluations=solver.evaluations, start=start, stochastic=True)


def langevin(corrections: int = 1, snr: float = 0.16, predictor: Solver = EULER) -> Solver:
    """Take steps of Langevin dynamics at t, which pull x back to the marginal, then the predictor's step to t_next.

    Song et al. 2021 (arXiv:2011.13456), algorithms 4 and 5: x + e score + sqrt(2 e) z, correcting before each
    step rather than after (the last correction, at sigma = 0, would do nothing). Their e = 2 (snr |z|/|score|)^2
    is taken at the norm that the noise x0 has, e = 2 (snr sigma)^2, so that no row depends on another; it is
    annealed with sigma, as in Song & Ermon 2019 (arXiv:1907.05600). Its step has a finite size whatever the
    grid, and leaves a bias of the relative variance below snr^2 that more steps do not remove: order 0.

    Args:
        corrections: Langevin steps, of one evaluation each, per step of the predictor.
        snr: their signal-to-noise ratio r, in (0, 1).
        predictor: any solver; ``euler_maruyama("sbdm")`` or ``ddpm()`` for the paper's. Default: Euler.

    Raises:
        UserError: corrections < 1, or snr is not in (0, 1).
    """
    if corrections < 1:
        raise UserError(f"{corrections} Langevin corrections", "Use at least 1, or the predictor alone.")
    if not 0.0 < snr < 1.0:
        raise UserError(
            f"signal-to-noise ratio {snr} of the solver 'langevin'", "Use 0 < snr < 1; 0.16 is usual."
        )
    target = _Sde(lambda path, t: (2.0 * snr * path.sigma(t)) ** 2, 1.0)  # half of it is e

    def start(options: SolverOptions) -> Step:
        predict = predictor.start(options)

        def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
            std = math.sqrt(target.g_squared(t, options.path))
            for _ in range(corrections):
                pull = target.score_term(field(x, t), x, t, options)
                x = x + pull + std * normal_like(x, options.generator)
            return predict(field, x, t, t_next)

        return step

    evaluations = None if predictor.evaluations is None else predictor.evaluations + corrections
    return Solver(order=0, evaluations=evaluations, start=start, stochastic=True)


def _sde_solver(
    ode: Solver, quadrature: tuple[float, float], diffusion: str | Diffusion, scale: float
) -> Solver:
    """Take an ODE solver's step along the drift; its later stages start from points that hold the step's noise.

    ``quadrature``: weights of g^2 at t and t_next in the variance of that noise.
    """
    function = lookup(DIFFUSIONS, diffusion, "diffusion") if isinstance(diffusion, str) else diffusion
    if not 0.0 <= scale < math.inf:
        raise UserError(f"diffusion scale {scale}", "Use a finite number from 0 (the ODE); 1 is usual.")
    sde = _Sde(function, scale)

    def start(options: SolverOptions) -> Step:
        ode_step = ode.start(options)
        if scale == 0:
            return ode_step

        def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
            variance = sum(
                weight * sde.g_squared(time, options.path)
                for weight, time in zip(quadrature, (t, t_next), strict=True)
                if weight
            )
            noise = math.sqrt(abs(t_next - t) * variance) * normal_like(x, options.generator)
            sign = math.copysign(1.0, t_next - t)  # reversed time turns the sign of u, not that of the score

            def drift(y: Tensor, s: float) -> Tensor:
                y = y if s == t else y + noise
                velocity = field(y, s)
                return velocity + sign * sde.score_term(velocity, y, s, options)

            return ode_step(drift, x, t, t_next) + noise

        return step

    return Solver(order=ode.order, evaluations=ode.evaluations, start=start, stochastic=True)


@dataclass(frozen=True)
class _Sde:
    """dx = (u + g^2/2 score) dt + g dW with g^2 = scale^2 diffusion."""

    diffusion: Diffusion
    scale: float

    def g_squared(self, t: float, path: Path) -> float:
        value = self.scale**2 * float(self.diffusion(path, torch.tensor(t, dtype=torch.float64)))
        if not 0.0 <= value < math.inf:
            raise UserError(
                f"the diffusion's g^2 is {value:g} at t = {t:g} on {path}",
                "Use another diffusion ('sigma' is finite everywhere), keep the times away from this t, or, "
                "for 'sbdm', the solver 'ddpm', which takes finite steps of the same process.",
            )
        return value

    def score_term(self, velocity: Tensor, x: Tensor, t: float, options: SolverOptions) -> Tensor:
        """g^2/2 score = -(g^2 / (2 sigma)) x0, from the ``velocity`` at (x, t)."""
        g_squared = self.g_squared(t, options.path)
        if options.score is not None:
            return (g_squared / 2) * _given_score(options.score, x, t)
        sigma = schedule(options.path, t)[1]
        if sigma <= _TINY:  # 0 / 0: the limit, taken from inside the interval
            if g_squared > _TINY:
                raise UserError(
                    f"the score is infinite at t = {t:g} (sigma = 0), where this diffusion's g^2 is {g_squared:g}",
                    "Use a diffusion that vanishes with sigma, such as 'sigma', or times that stay away from "
                    f"t = {t:g}, for example up to 0.999.",
                )
            inside = min(max(t, 1e-6), 1.0 - 1e-6)
            g_squared, sigma = self.g_squared(inside, options.path), schedule(options.path, inside)[1]
        return (-g_squared / (2 * sigma)) * convert(velocity, x, t, options.path, "velocity", "noise")


_TINY = 1e-12  # rounding of a schedule that is 0: sin(pi), cos(pi / 2)


def _lower_snr(path: Path, t: float, growth: float) -> float:
    """The time at which sigma/alpha is 1 + ``growth`` times that at t."""
    log_snr = path.log_snr(torch.tensor(t, dtype=torch.float64))
    return float(path.inverse_log_snr(log_snr - 2.0 * math.log1p(growth)))


def renoise(x: Tensor, t: float, back: float, path: Path, generator: Generators) -> Tensor:
    """Turn x at t into a sample at the earlier time ``back``, by adding noise."""
    (alpha, sigma), (alpha_back, sigma_back) = schedule(path, t), schedule(path, back)
    shrink = alpha_back / alpha
    std = math.sqrt(max(sigma_back**2 - (shrink * sigma) ** 2, 0.0))
    return shrink * x + std * normal_like(x, generator)


def _refuse_score(solver: str, options: SolverOptions) -> None:
    if options.score is not None:
        raise UserError(
            f"the solver '{solver}' samples the path's own marginals, and takes no separate score",
            "Leave the score out, or use 'euler-maruyama' or 'stochastic-heun'.",
        )


def _given_score(score: Velocity, x: Tensor, t: float) -> Tensor:
    value = score(x, torch.full((), t, dtype=x.dtype, device=x.device))
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
