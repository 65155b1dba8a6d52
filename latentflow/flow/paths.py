"""Probability paths x_t = alpha(t) x1 + sigma(t) x0 from noise (t = 0) to data (t = 1).

A new path is one subclass of ``Path`` with four schedules, and one line in ``PATHS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .tensors import compute_dtype, expand_t


class PathSample(NamedTuple):
    """A point on a path: ``xt`` and ``velocity`` = d xt / dt, both (B, ...), and what they were made from."""

    xt: Tensor
    velocity: Tensor
    x0: Tensor
    x1: Tensor
    t: Tensor


class Coefficients(NamedTuple):
    """The four schedules at one t, shaped to multiply (B, ...) tensors."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class Path(ABC):
    """x_t = alpha(t) x1 + sigma(t) x0. Schedules are elementwise: tensors shaped like t."""

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

    def at(self, t: Tensor | float, x: Tensor) -> Coefficients:
        """The schedules at ``t`` (scalar or (B,), in [0, 1]), ready to multiply ``x`` (B, ...).

        They are evaluated in t's own precision and only then rounded to that of x (at least float32).
        """
        wide = expand_t(t, x)
        schedules = (self.alpha(wide), self.sigma(wide), self.d_alpha(wide), self.d_sigma(wide))
        return Coefficients(*(value.to(compute_dtype(x)).to(x.device) for value in schedules))

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
        ValueError: ``sigma_min`` is not in [0, 1).
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.sigma_min < 1.0:
            raise ValueError(f"sigma_min must lie in [0, 1), not {self.sigma_min}; usual values: 0 or 1e-4")

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1.0 - (1.0 - self.sigma_min) * t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -(1.0 - self.sigma_min))


PATHS: dict[str, type[Path]] = {
    "condot": CondOT,
}
