"""Probability paths x_t = alpha(t) x1 + sigma(t) x0 from noise (t = 0) to data (t = 1).

A new path is one subclass of ``Path`` with four schedules, and one line in ``PATHS``.

The schedules are finite on [0, 1] and so are their derivatives, with two exceptions, both at t = 1: sigma' of
``VariancePreserving`` and of ``SqrtPath`` is -infinite. At t = 0 the velocity of a ``Polynomial`` of degree > 1
vanishes and so tells nothing of the data. ``Path.clip`` moves t away from these three ends into
``Path.interval``: ``Path.at`` applies it to the derivatives (never to alpha and sigma), ``as_velocity`` and
``change_path`` to the t at which they evaluate a network. Other code that divides by alpha or sigma states its own
limit: ``as_velocity`` (predictions that do not determine the velocity), ``loss_factor``, ``SchrodingerBridge``, and the
score as a target.

The log-SNR, log(alpha^2 / sigma^2), is +infinite at t = 1 but for ``VarianceExploding`` and a ``CondOT`` with
sigma_min > 0, and -infinite at t = 0 but for ``VariancePreserving`` (-10.05 as it stands) and
``VarianceExploding``; these two also start with some of the data: alpha(0) = 0.0066 and 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .tensors import compute_dtype, expand_t, time_dtype


class PathSample(NamedTuple):
    """A point on a path: ``xt`` and ``velocity`` = d xt / dt, both (B, ...), and what they were made from."""

    xt: Tensor
    velocity: Tensor
    x0: Tensor
    x1: Tensor
    t: Tensor


class Coefficients(NamedTuple):
    """The four schedules at one t, shaped to multiply (B, ...) tensors; the derivatives are finite."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class Path(ABC):
    """x_t = alpha(t) x1 + sigma(t) x0. Schedules are elementwise: tensors shaped like t, which is in [0, 1]."""

    @property
    def interval(self) -> tuple[float, float]:
        """Times (first, last) between which the derivatives are finite and the velocity determines the data."""
        return 0.0, 1.0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The weight of the data x1."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The weight of the source x0."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """d alpha / dt."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """d sigma / dt."""

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), increasing in t; infinite where alpha or sigma is 0."""
        return 2.0 * (self.alpha(t).log() - self.sigma(t).log())

    def d_log_snr(self, t: Tensor) -> Tensor:
        """d log-SNR / dt; infinite where the log-SNR is."""
        return 2.0 * (self.d_alpha(t) / self.alpha(t) - self.d_sigma(t) / self.sigma(t))

    def inverse_log_snr(self, value: Tensor) -> Tensor:
        """The t at which the log-SNR is ``value``; the nearest end if it never is. +-infinity is allowed.

        By bisection, for paths that have no closed form.
        """
        low, high = torch.zeros_like(value), torch.ones_like(value)
        for _ in range(60):
            middle = 0.5 * (low + high)
            below = self.log_snr(middle) < value
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        ends = torch.zeros_like(value), torch.ones_like(value)
        found = torch.where(value <= self.log_snr(ends[0]), ends[0], 0.5 * (low + high))
        return torch.where(value >= self.log_snr(ends[1]), ends[1], found)

    def clip(self, t: Tensor) -> Tensor:
        """Move ``t`` into ``interval``: values that are infinite at an end of time are taken a little before it."""
        return t.clamp(*self.interval)

    def at(self, t: Tensor | float, x: Tensor) -> Coefficients:
        """The schedules at ``t`` (scalar or (B,), in [0, 1]), ready to multiply ``x`` (B, ...).

        alpha and sigma are exact, their derivatives those at the clipped t, so that ``sample`` and ``convert`` agree.
        All are evaluated in float64 and only then rounded to the precision of x (at least float32).
        """
        wide = expand_t(t, x)
        wide = wide.to(time_dtype(wide.device))
        inner = self.clip(wide)
        schedules = (self.alpha(wide), self.sigma(wide), self.d_alpha(inner), self.d_sigma(inner))
        return Coefficients(*(value.to(compute_dtype(x)).to(x.device) for value in schedules))

    def start(self, noise: Tensor) -> Tensor:
        """Return the start of sampling, at t = 0: ``noise`` times sigma(0), which is 1 but for variance exploding."""
        return noise * self.sigma(torch.zeros((), dtype=torch.float64)).item()

    def scale_input(self, xt: Tensor, t: Tensor | float) -> Tensor:
        """Return ``xt`` as a network should see it: unchanged, or, where its scale explodes, divided by the scale."""
        return xt

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor | float) -> PathSample:
        """The point at ``t`` between the source ``x0`` and the data ``x1``, and its velocity.

        Args:
            x0, x1: (B, ...) of equal shape.
            t: a scalar or (B,), in [0, 1].

        Returns:
            ``xt`` and ``velocity`` in the dtype of x0 and x1; half precision is calculated in float32.

        Raises:
            ValueError: the shapes differ, or t has a wrong shape or range.
        """
        if x0.shape != x1.shape:
            raise ValueError(
                f"x0 has shape {tuple(x0.shape)} but x1 has shape {tuple(x1.shape)}: "
                "draw one source sample per data sample, of the same shape"
            )
        dtype = torch.promote_types(x0.dtype, x1.dtype)
        precision = compute_dtype(x0, x1)
        source, data = x0.to(precision), x1.to(precision)
        c = self.at(t, data)
        xt = c.alpha * data + c.sigma * source
        velocity = c.d_alpha * data + c.d_sigma * source
        times = t if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float64)
        return PathSample(xt.to(dtype), velocity.to(dtype), x0, x1, times)


@dataclass(frozen=True)
class CondOT(Path):
    """The straight, conditional optimal-transport path: alpha = t, sigma = 1 - (1 - sigma_min) t.

    Lipman et al. 2022 (arXiv:2210.02747), eq. 20-22; with ``sigma_min`` = 0 it is the rectified flow of
    Liu et al. 2022 (arXiv:2209.03003), eq. 1, whose velocity is x1 - x0.

    Raises:
        UserError: ``sigma_min`` is not in [0, 1).
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.sigma_min < 1.0:
            raise UserError(f"sigma_min must lie in [0, 1), not {self.sigma_min}", "Usual values: 0 or 1e-4")

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1.0 - (1.0 - self.sigma_min) * t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -(1.0 - self.sigma_min))

    def inverse_log_snr(self, value: Tensor) -> Tensor:
        return (1.0 / ((-0.5 * value).exp() + 1.0 - self.sigma_min)).clamp(max=1.0)


@dataclass(frozen=True)
class VariancePreserving(Path):
    """Denoising diffusion in continuous time, alpha^2 + sigma^2 = 1: alpha = exp(-B / 2), sigma^2 = 1 - exp(-B).

    Song et al. 2020 (arXiv:2011.13456), app. C, whose time runs from data to noise: here s = 1 - t and
    B = beta_min s + (beta_max - beta_min) s^2 / 2, the integral of the linear noise schedule from 0 to s.

    Raises:
        UserError: not 0 < beta_min <= beta_max < infinity.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    @property
    def interval(self) -> tuple[float, float]:
        return 0.0, 1.0 - 1e-5

    def __post_init__(self) -> None:
        if not 0.0 < self.beta_min <= self.beta_max < math.inf:
            raise UserError(
                f"beta_min and beta_max must be finite with 0 < beta_min <= beta_max, "
                f"not {self.beta_min} and {self.beta_max}",
                "Usual values: 0.1 and 20",
            )

    def _integral(self, t: Tensor) -> Tensor:
        s = 1.0 - t
        return s * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * s)

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * (1.0 - t)

    def alpha(self, t: Tensor) -> Tensor:
        return (-0.5 * self._integral(t)).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self._integral(t))).sqrt()  # expm1: exact where sigma is small

    def d_alpha(self, t: Tensor) -> Tensor:
        return 0.5 * self._beta(t) * self.alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -0.5 * self._beta(t) * self.alpha(t) ** 2 / self.sigma(t)

    def inverse_log_snr(self, value: Tensor) -> Tensor:
        # exp(B) - 1 = exp(-value); then s from B by the root of the quadratic that does not cancel.
        integral = torch.logaddexp(-value, torch.zeros_like(value)).clamp(
            max=0.5 * (self.beta_min + self.beta_max)
        )
        slope = 2.0 * (self.beta_max - self.beta_min)
        s = 2.0 * integral / (self.beta_min + (self.beta_min**2 + slope * integral).sqrt())
        return (1.0 - s).clamp(0.0, 1.0)


@dataclass(frozen=True)
class VarianceExploding(Path):
    """Noise of geometrically falling level on unscaled data: alpha = 1, sigma = sigma_max^(1-t) sigma_min^t.

    Song et al. 2020 (arXiv:2011.13456), app. C. Sampling starts from sigma_max times the noise: ``Path.start``.

    Raises:
        UserError: not 0 < sigma_min < sigma_max < infinity.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma_min < self.sigma_max < math.inf:
            raise UserError(
                f"sigma_min and sigma_max must be finite with 0 < sigma_min < sigma_max, "
                f"not {self.sigma_min} and {self.sigma_max}",
                "Usual values: 0.01 and 50",
            )

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * (self.sigma_min / self.sigma_max) ** t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return math.log(self.sigma_min / self.sigma_max) * self.sigma(t)

    def inverse_log_snr(self, value: Tensor) -> Tensor:
        t = (math.log(self.sigma_max) + 0.5 * value) / math.log(self.sigma_max / self.sigma_min)
        return t.clamp(0.0, 1.0)

    def scale_input(self, xt: Tensor, t: Tensor | float) -> Tensor:
        """Return ``xt`` divided by its standard deviation, if that of the data is about 1."""
        sigma = self.at(t, xt).sigma
        return (xt / (1.0 + sigma**2).sqrt()).to(xt.dtype)


@dataclass(frozen=True)
class Trigonometric(Path):
    """A quarter of a circle: alpha = sin(pi t / 2), sigma = cos(pi t / 2).

    Albergo and Vanden-Eijnden 2022 (arXiv:2209.15571), eq. 5; "GVP" in Ma et al. 2024 (arXiv:2401.08740), sec. 2.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * (1.0 - t))  # unlike cos, exactly 0 at t = 1

    def d_alpha(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * self.sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * self.alpha(t)

    def inverse_log_snr(self, value: Tensor) -> Tensor:
        return (torch.atan((0.5 * value).exp()) / (0.5 * math.pi)).clamp(max=1.0)


@dataclass(frozen=True)
class Polynomial(Path):
    """The straight line at another speed: alpha = t^n, sigma = 1 - t^n, for n = ``degree``.

    The larger n, the more time is spent near the noise. The schedule is that of Gat et al. 2024 (arXiv:2407.15595).

    Raises:
        UserError: ``degree`` is not a finite number >= 1 (below 1 the velocity is infinite at t = 0).
    """

    degree: float = 2.0

    @property
    def interval(self) -> tuple[float, float]:
        # From where alpha' is 2e-4 on (it is n t^(n-1)): what is divided by it is magnified 5000 times at most.
        return (2e-4 / self.degree) ** (1.0 / (self.degree - 1.0)) if self.degree > 1.0 else 0.0, 1.0

    def __post_init__(self) -> None:
        if not 1.0 <= self.degree < math.inf:
            raise UserError(
                f"degree must be a finite number of at least 1, not {self.degree}", "Usual values: 2 or 3"
            )

    def alpha(self, t: Tensor) -> Tensor:
        return t**self.degree

    def sigma(self, t: Tensor) -> Tensor:
        return 0.0 - torch.expm1(self.degree * t.log())  # exact where sigma is small; at t = 1 +0, not -0

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.degree * t ** (self.degree - 1.0)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.d_alpha(t)

    def d_log_snr(self, t: Tensor) -> Tensor:
        return 2.0 * self.degree / (t * self.sigma(t))  # alpha' / alpha would be 0 / 0 at t = 0

    def inverse_log_snr(self, value: Tensor) -> Tensor:
        return torch.sigmoid(0.5 * value) ** (1.0 / self.degree)


@dataclass(frozen=True)
class SqrtPath(Path):
    """A quarter of a circle with alpha growing linearly: alpha = t, sigma = sqrt(1 - t^2).

    The variance-preserving interpolation with the signal as the time. Its velocity is unbounded towards t = 1.
    """

    @property
    def interval(self) -> tuple[float, float]:
        return 0.0, 1.0 - 5e-7  # alpha / sigma = 1000, as at the end of VariancePreserving

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return ((1.0 - t) * (1.0 + t)).sqrt()  # without the cancellation of 1 - t^2

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -t / self.sigma(t)

    def inverse_log_snr(self, value: Tensor) -> Tensor:
        return torch.sigmoid(value).sqrt()


@dataclass(frozen=True)
class DDPM(Path):
    """Denoising diffusion in K discrete steps: alpha^2 = (1 - beta_0) ... (1 - beta_k), sigma^2 = 1 - alpha^2.

    Ho et al. 2020 (arXiv:2006.11239), eq. 4, with betas on a line from ``beta_start`` to ``beta_end``. Timestep k is at
    t = 1 - (k + 1) / K; between two of them alpha is smooth, and t = 1 is the data. Networks that were
    trained on the K timesteps are sampled on this path exactly; ``VariancePreserving`` is near it.

    Raises:
        UserError: not 0 < beta_start <= beta_end < 1, or no whole number of steps from 2.
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: float = 1000

    @property
    def interval(self) -> tuple[float, float]:
        return 0.0, 1.0 - 1e-5

    def __post_init__(self) -> None:
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise UserError(
                f"beta_start and beta_end must lie in (0, 1), the end not below the start, "
                f"not {self.beta_start} and {self.beta_end}",
                "Usual values: 0.0001 and 0.02",
            )
        if not (self.steps >= 2 and float(self.steps).is_integer()):
            raise UserError(f"steps must be a whole number from 2, not {self.steps}", "Usual value: 1000")

    def _logarithm(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log(alpha^2) and its derivative.

        The product over betas on a line is a quotient of gamma functions, by which it is continued between the
        timesteps; Stirling's series, arranged so that nothing cancels, gives its logarithm to 1e-11.
        """
        n = self.steps * (1.0 - t)  # factors of the product
        if self.beta_end == self.beta_start:
            slope = torch.full_like(n, math.log1p(-self.beta_start))
            return n * slope, -self.steps * slope
        step = (self.beta_end - self.beta_start) / (self.steps - 1)
        first = math.log1p(step - self.beta_start)
        size = (1.0 - self.beta_start) / step + 1.0
        rest, fall = size - n, torch.log1p(-n / size)
        value = n * first - (rest - 0.5) * fall - n - n / (12.0 * size * rest)
        slope = first + fall - 0.5 / rest - 1.0 / (12.0 * rest**2)
        return value, -self.steps * slope

    def alpha(self, t: Tensor) -> Tensor:
        return (0.5 * self._logarithm(t)[0]).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(self._logarithm(t)[0])).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        value, slope = self._logarithm(t)
        return 0.5 * slope * (0.5 * value).exp()

    def d_sigma(self, t: Tensor) -> Tensor:
        value, slope = self._logarithm(t)
        return -0.5 * slope * value.exp() / (-torch.expm1(value)).sqrt()


PATHS: dict[str, type[Path]] = {
    "condot": CondOT,
    "variance-preserving": VariancePreserving,
    "variance-exploding": VarianceExploding,
    "trigonometric": Trigonometric,
    "polynomial": Polynomial,
    "sqrt": SqrtPath,
    "ddpm": DDPM,
}
