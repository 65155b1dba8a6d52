"""Schedules kappa(t) of mixture paths: the probability that a position holds its data token at t.

A new one is one subclass of ``Kappa`` with two functions, and one line in ``KAPPAS``. Every kappa runs from 0 at t = 0
to 1 at t = 1 and does not fall.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UserError


class Kappa(ABC):
    """kappa(t), elementwise: tensors shaped like t, which is in [0, 1]."""

    @abstractmethod
    def __call__(self, t: Tensor) -> Tensor:
        """The probability of the data token."""

    @abstractmethod
    def derivative(self, t: Tensor) -> Tensor:
        """d kappa / dt."""

    def remainder(self, t: Tensor) -> Tensor:
        """1 - kappa(t): the probability of the source."""
        return 1.0 - self(t)

    def inverse(self, value: Tensor) -> Tensor:
        """The t at which kappa is ``value``, in [0, 1]. By bisection, for schedules that have no closed form."""
        low, high = torch.zeros_like(value), torch.ones_like(value)
        for _ in range(60):
            middle = 0.5 * (low + high)
            below = self(middle) < value
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return 0.5 * (low + high)


@dataclass(frozen=True)
class LinearKappa(Kappa):
    """kappa = t: the masked diffusion with a linear schedule (Campbell et al. 2024, arXiv:2402.04997)."""

    def __call__(self, t: Tensor) -> Tensor:
        return t

    def derivative(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def inverse(self, value: Tensor) -> Tensor:
        return value


@dataclass(frozen=True)
class PolynomialKappa(Kappa):
    """kappa = t^n, for n = ``degree``: the larger n, the more time is spent near the source.

    Gat et al. 2024 (arXiv:2407.15595), who take n up to 3.

    Raises:
        UserError: ``degree`` is not in [1, 50]: below, the rate is infinite at t = 0; above, t^n is no number there.
    """

    degree: float = 2.0

    def __post_init__(self) -> None:
        if not 1.0 <= self.degree <= 50.0:
            raise UserError(
                f"degree must be a number of at least 1 and at most 50, not {self.degree}",
                "Usual values: 2 or 3",
            )

    def __call__(self, t: Tensor) -> Tensor:
        return t**self.degree

    def derivative(self, t: Tensor) -> Tensor:
        return self.degree * t ** (self.degree - 1.0)

    def remainder(self, t: Tensor) -> Tensor:
        return 0.0 - torch.expm1(self.degree * t.log())  # exact where it is small; at t = 1 +0, not -0

    def inverse(self, value: Tensor) -> Tensor:
        return value ** (1.0 / self.degree)


@dataclass(frozen=True)
class CosineKappa(Kappa):
    """kappa = 1 - cos(pi t / 2): few tokens early, many late.

    The mask ratio of MaskGIT, Chang et al. 2022 (arXiv:2202.04200), sec. 3.3.
    """

    def __call__(self, t: Tensor) -> Tensor:
        # exact where it is small, and at t = 1
        return torch.where(t < 1.0, 2.0 * torch.sin(0.25 * math.pi * t) ** 2, 1.0)

    def derivative(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * torch.sin(0.5 * math.pi * t)

    def remainder(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * (1.0 - t))

    def inverse(self, value: Tensor) -> Tensor:
        return torch.asin((0.5 * value).sqrt()) / (0.25 * math.pi)


@dataclass(frozen=True)
class CubicKappa(Kappa):
    """kappa = -2 t^3 + 3 t^2 + a (t^3 - 2 t^2 + t) + b (t^3 - t^2): slope a = ``first`` at t = 0, b = ``last`` at 1.

    Gat et al. 2024 (arXiv:2407.15595), for images.

    Raises:
        UserError: a slope is not in [0, 3], between which kappa does not fall.
    """

    first: float = 0.0
    last: float = 1.0

    def __post_init__(self) -> None:
        for name, slope in (("first", self.first), ("last", self.last)):
            if not 0.0 <= slope <= 3.0:
                raise UserError(
                    f"{name} slope of the cubic kappa is {slope}", "Use 0 to 3: kappa must not fall."
                )

    def __call__(self, t: Tensor) -> Tensor:
        # Horner's form of the four terms above
        a, b = self.first, self.last
        return t * (a + t * (3.0 - 2.0 * a - b + t * (a + b - 2.0)))

    def derivative(self, t: Tensor) -> Tensor:
        a, b = self.first, self.last
        return a + t * (2.0 * (3.0 - 2.0 * a - b) + 3.0 * t * (a + b - 2.0))

    def remainder(self, t: Tensor) -> Tensor:
        return CubicKappa(self.last, self.first)(1.0 - t)  # the same cubic seen from the other end


KAPPAS: dict[str, type[Kappa]] = {
    "linear": LinearKappa,
    "polynomial": PolynomialKappa,
    "cosine": CosineKappa,
    "cubic": CubicKappa,
}


def checked_kappa(kappa: Kappa) -> Kappa:
    """Return ``kappa``, if it is a schedule of a path.

    Raises:
        UserError: kappa is not 0 at t = 0 or not 1 at t = 1, falls somewhere, or is not finite.
    """
    values = kappa(torch.linspace(0.0, 1.0, 257, dtype=torch.float64))
    first, last = values[0].item(), values[-1].item()
    if not (abs(first) < 1e-9 and abs(last - 1.0) < 1e-9):
        raise UserError(
            f"{kappa} runs from {first:g} at t = 0 to {last:g} at t = 1",
            "It must be 0 at t = 0, where every token is the source's, and 1 at t = 1, where every token is data.",
        )
    if not bool((values.diff() >= -1e-12).all()):  # NaN is refused too
        raise UserError(f"{kappa} falls between t = 0 and t = 1", "It must not fall: use another schedule.")
    return kappa
