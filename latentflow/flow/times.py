"""Times in [0, 1]: densities of t for training, and grids of steps for sampling.

A new density is one subclass of ``TimeDensity`` and one line in ``TIME_DENSITIES``; a new grid is one function and one
line in ``TIME_GRIDS``. Formulas of Esser et al. 2024 (SD3, arXiv:2403.03206) are turned round: their t = 1 is noise,
ours is data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, finite, make, shown, whole

# Slopes are taken at a u no nearer than this to 0 and 1, where the densities that vanish there have none.
_EDGE = 2.0**-53
#: With more steps each is so small that float32 rounds away much of what it adds.
MOST_STEPS = 100_000
STEPS_FIX = f"Use a whole number from 1 to {MOST_STEPS}; 20 to 50 are usual."


@dataclass(frozen=True)
class TimeDensity(ABC):
    """A density of training times, given by its quantile function t(u) of uniform numbers u.

    The caller draws u, so that each sample's t may come from its own seed (and stratified or low-discrepancy
    numbers work unchanged).

    Attributes:
        shift: above 1 moves every t towards the noise, as large images need; see ``shifted``.
    """

    shift: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        check_positive("time shift", self.shift, "1 changes nothing.")

    def quantile(self, u: Tensor) -> Tensor:
        """Return t(u): float64, shaped like ``u``, in [0, 1], increasing in u.

        Raises:
            ValueError: u is outside [0, 1].
        """
        return shifted(self._quantile(_uniform(u)), self.shift)

    def slope(self, u: Tensor) -> Tensor:
        """Return dt/du = 1 / (probability density at t(u)): float64, shaped like ``u``, finite.

        Raises:
            ValueError: u is outside [0, 1].
        """
        u = _uniform(u).clamp(_EDGE, 1.0 - _EDGE)
        t = self._quantile(u)
        return self._slope(u, t) * self.shift / (t + self.shift * (1.0 - t)) ** 2

    @abstractmethod
    def _quantile(self, u: Tensor) -> Tensor:
        """t(u) before the shift."""

    @abstractmethod
    def _slope(self, u: Tensor, t: Tensor) -> Tensor:
        """dt/du before the shift, at u and t = t(u)."""


@dataclass(frozen=True)
class UniformTimes(TimeDensity):
    """t = u."""

    def _quantile(self, u: Tensor) -> Tensor:
        return u

    def _slope(self, u: Tensor, t: Tensor) -> Tensor:
        return torch.ones_like(u)


@dataclass(frozen=True)
class LogitNormal(TimeDensity):
    """Times with logit(t) ~ N(mean, std^2): most lie in the middle of the path.

    SD3, eq. 19, whose location m is -``mean`` here: a positive mean leans towards the data (t = 1).

    Raises:
        UserError: std <= 0, or not finite.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        finite("mean of the logit-normal density", self.mean, fix="Use a finite number; 0 is usual.")
        check_positive("std of the logit-normal density", self.std, "1 is usual.")

    def _quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def _slope(self, u: Tensor, t: Tensor) -> Tensor:
        z = torch.special.ndtri(u)
        return self.std * t * (1.0 - t) * math.sqrt(2.0 * math.pi) * torch.exp(0.5 * z**2)


@dataclass(frozen=True)
class Mode(TimeDensity):
    """A density with its mode in the middle of the path (scale > 0) or at both ends (scale < 0).

    SD3, eq. 20, whose best scale is the default. Its density is finite and positive everywhere, unlike the
    logit-normal.

    Raises:
        UserError: scale is not in [-1, 2 / (pi - 2)], where t(u) is increasing.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1.0 <= self.scale <= 2.0 / (math.pi - 2.0):
            raise UserError(f"scale {self.scale} of the mode density", "Use -1 to 1.75; 1.29 is usual.")

    def _quantile(self, u: Tensor) -> Tensor:
        # 1 - f(u) of the paper; cos^2 - 1 + u written as u - sin^2, which is 0 at both ends.
        return u + self.scale * (u - torch.sin(0.5 * math.pi * u) ** 2)

    def _slope(self, u: Tensor, t: Tensor) -> Tensor:
        return 1.0 + self.scale * (1.0 - 0.5 * math.pi * torch.sin(math.pi * u))


@dataclass(frozen=True)
class CosineMap(TimeDensity):
    """The straight path's times with the log-SNRs of the cosine schedule: density 2 / (pi (t^2 + (1 - t)^2)).

    SD3, eq. 21; symmetric, so the direction of t does not matter. The cosine schedule (Nichol & Dhariwal 2021,
    arXiv:2102.09672) has noise and data weights cos and sin of pi u / 2.
    """

    def _quantile(self, u: Tensor) -> Tensor:
        return _cosine_map(u)

    def _slope(self, u: Tensor, t: Tensor) -> Tensor:
        return 0.5 * math.pi / (1.0 + torch.sin(math.pi * u))


@dataclass(frozen=True)
class Beta(TimeDensity):
    """Density proportional to t^(a - 1) (1 - t)^(b - 1); a > b leans towards the data. a = b = 1 is uniform.

    Raises:
        UserError: a or b is not positive.
    """

    a: float = 2.0
    b: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("a of the beta density", self.a, "1 is uniform.")
        check_positive("b of the beta density", self.b, "1 is uniform.")

    def _quantile(self, u: Tensor) -> Tensor:
        from scipy.special import betaincinv  # slow to import

        t = betaincinv(self.a, self.b, u.detach().cpu().numpy())
        return torch.as_tensor(t, dtype=u.dtype, device=u.device)

    def _slope(self, u: Tensor, t: Tensor) -> Tensor:
        from scipy.stats import beta

        log_density = beta.logpdf(t.detach().cpu().numpy(), self.a, self.b)
        return torch.as_tensor(log_density, dtype=u.dtype, device=u.device).neg().exp()


@dataclass(frozen=True)
class Power(TimeDensity):
    """Density p t^(p - 1), t = u^(1/p), for ``exponent`` p: above 1 leans towards the data. It is Beta(p, 1).

    Raises:
        UserError: the exponent is not positive.
    """

    exponent: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("exponent of the power density", self.exponent, "1 is uniform.")

    def _quantile(self, u: Tensor) -> Tensor:
        return u ** (1.0 / self.exponent)

    def _slope(self, u: Tensor, t: Tensor) -> Tensor:
        return t / (self.exponent * u)


TIME_DENSITIES: dict[str, type[TimeDensity]] = {
    "uniform": UniformTimes,
    "logit-normal": LogitNormal,
    "mode": Mode,
    "cosine-map": CosineMap,
    "beta": Beta,
    "power": Power,
}


def shifted(t: Tensor, shift: float) -> Tensor:
    """Move times towards the noise, for ``shift`` > 1: sigma' = shift sigma / (1 + (shift - 1) sigma), sigma = 1 - t.

    SD3, eq. 23, where the shift is the root of the ratio of pixel counts. Shifts multiply: by 2, then by 3, is by 6.
    """
    # 1 - sigma' written in t: no cancellation, and exactly 0 and 1 at the ends.
    return t / (t + shift * (1.0 - t))


def uniform_grid(steps: int) -> Tensor:
    """Equal steps."""
    return torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)


def cosine_grid(steps: int) -> Tensor:
    """The straight path's times with the log-SNRs of equal steps of the cosine schedule; smaller in the middle."""
    return _cosine_map(uniform_grid(steps))


def sine_grid(steps: int, depth: float = 0.5) -> Tensor:
    """Even steps u, drawn together towards both ends, where a guided flow bends most: u - depth sin(2 pi u) / (2 pi).

    Args:
        steps: number of steps.
        depth: in [0, 1): the shortest steps are 1 - depth, the longest 1 + depth, of even ones.

    Raises:
        UserError: depth is outside.
    """
    if not 0.0 <= depth < 1.0:
        raise UserError(f"depth {depth} of the sine grid", "Use 0 (even steps) to less than 1.")
    even = uniform_grid(steps)
    return even - depth * torch.sin(2.0 * math.pi * even) / (2.0 * math.pi)


def edm_grid(steps: int, rho: float = 7.0, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """The straight path's times with the noise levels of Karras et al. 2022 (EDM, arXiv:2206.00364), eq. 5.

    Args:
        steps: number of steps.
        rho: higher makes the steps near the data smaller.
        sigma_min, sigma_max: the last level but one (then 0), and the first, as sigma / alpha. At the first
            level t is taken as 0, pure noise.

    Raises:
        UserError: rho is not positive, or not 0 < sigma_min < sigma_max.
    """
    check_positive("rho of the EDM grid", rho, "7 is usual.")
    if not 0.0 < sigma_min < sigma_max < math.inf:
        raise UserError(
            f"noise levels {sigma_min} to {sigma_max} of the EDM grid",
            "Use 0 < sigma_min < sigma_max; 0.002 and 80 are usual.",
        )
    low, high = sigma_min ** (1.0 / rho), sigma_max ** (1.0 / rho)
    ratio = (high + torch.linspace(0.0, 1.0, steps, dtype=torch.float64) * (low - high)) ** rho
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([ends[:1], 1.0 / (1.0 + ratio[1:]), ends[1:]])


#: Grids for the straight path. For another path, ``path.inverse_log_snr(CondOT().log_snr(grid))`` has the same
#: log-SNRs. ``integrate`` also takes any other increasing sequence.
TIME_GRIDS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform_grid,
    "cosine": cosine_grid,
    "sine": sine_grid,
    "edm": edm_grid,
}


def time_grid(steps: int, shift: float = 1.0, kind: str = "uniform", **options: Any) -> Tensor:
    """Sampling times from exactly 0 (noise) to exactly 1 (data): ``steps`` steps, so ``steps`` + 1 times, float64.

    Args:
        steps: at least 1.
        shift: above 1 spends more steps near the noise, as large images need; see ``shifted``.
        kind: a key of ``TIME_GRIDS``.
        options: the grid's own ("sine": depth; "edm": rho, sigma_min, sigma_max).

    Raises:
        UserError: steps is not a whole number from 1 to ``MOST_STEPS``; shift <= 0, an unknown kind or option, or an
            option out of range.
    """
    steps = whole("the number of sampling steps", steps, 1, MOST_STEPS, fix=STEPS_FIX)
    check_positive("time shift", shift, "1 is the uniform grid.")
    return shifted(make(TIME_GRIDS, kind, "time grid", steps=steps, **options), shift)


def checked_times(times: Tensor | Sequence[float], *, rising: bool = False) -> list[float]:
    """Return the times as a grid that a solver can follow, in float64.

    Args:
        times: N + 1 of them for N steps.
        rising: accept only times from noise to data; otherwise falling times as well.

    Raises:
        UserError: fewer than two, not in one row, no numbers, outside [0, 1], or not strictly monotone.
    """
    try:
        grid = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:  # torch, of strings, None and ragged lists
        raise UserError(
            f"times are {shown(times)}", "Pass a row of numbers, such as time_grid(20)."
        ) from error
    if grid.ndim != 1 or len(grid) < 2:
        raise UserError(
            f"times has shape {tuple(grid.shape)}",
            "Pass N + 1 times for N >= 1 steps that increase, such as time_grid(20).",
        )
    if not bool(((grid >= 0) & (grid <= 1)).all()):
        raise UserError(
            f"times must lie in [0, 1], but are {_brief(grid)}", "t = 0 is noise, t = 1 is data: scale them."
        )
    gaps = grid.diff()
    if not (bool((gaps > 0).all()) or (bool((gaps < 0).all()) and not rising)):
        way = "increase from noise to data" if rising else "strictly increase or strictly decrease"
        raise UserError(f"times must {way}, but are {_brief(grid)}", "Sort them, and remove repeats.")
    values: list[float] = grid.tolist()
    return values


def _brief(grid: Tensor) -> str:
    values = [f"{value:g}" for value in grid.tolist()]
    return "[" + ", ".join(values if len(values) <= 12 else [*values[:6], "...", *values[-5:]]) + "]"


def _cosine_map(u: Tensor) -> Tensor:
    angle = 0.5 * math.pi * u
    return torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))


def _uniform(u: Tensor) -> Tensor:
    u = u.to(torch.float64)
    # A GPU would have to be waited for, in every pass of a training.
    if u.device.type == "cpu" and not bool(((u >= 0) & (u <= 1)).all()):
        raise ValueError(
            f"u must be uniform numbers in [0, 1] (torch.rand), but spans [{u.min():g}, {u.max():g}]"
        )
    return u


def check_positive(name: str, value: float, usual: str = "") -> None:
    """Refuse a setting that is not a positive number; the error says which values are usual."""
    if not 0.0 < value < math.inf:
        raise UserError(
            f"{name} is {value}", f"Use a positive number; {usual}" if usual else "Use a positive number."
        )
