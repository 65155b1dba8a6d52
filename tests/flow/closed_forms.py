"""Flows that are known exactly, and small helpers that the tests of flow share; float64 throughout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latentflow.flow import PATHS, CondOT, Path, Velocity

#: Every path of the table with its defaults, and the straight one that stops short of the data.
EVERY_PATH: dict[str, Path] = {name: make() for name, make in PATHS.items()} | {
    "condot-sigma-min": CondOT(sigma_min=0.05)
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Watched:
    """A velocity that remembers its calls as pairs (x, t)."""

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = velocity
        self.calls: list[tuple[Tensor, float]] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append((x, float(t)))
        return self.velocity(x, t)

    @property
    def times(self) -> list[float]:
        return [t for _, t in self.calls]


def gaussian_velocity(mean: float | Tensor, std: float) -> Velocity:
    """Return the exact velocity from N(0, 1) to N(mean, std^2) on the straight path; t broadcasts against x."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        variance = (t * std) ** 2 + (1 - t) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return velocity


@dataclass(frozen=True)
class Mixture:
    """x1 ~ sum_k weights_k N(means_k, stds_k^2), independently in every element of x.

    Posterior expectations given x_t = x by responsibilities: nothing divides by alpha or sigma.
    """

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def components(self, path: Path, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Return alpha, means, stds^2, residual, variance, log of the joint density, (..., K) or broadcast to it."""
        a, s = path.alpha(t)[..., None], path.sigma(t)[..., None]
        weights, means, stds = (
            torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means, self.stds)
        )
        variance = a**2 * stds**2 + s**2
        residual = x[..., None] - a * means
        log_joint = weights.log() - 0.5 * (residual**2 / variance + (2 * math.pi * variance).log())
        return a, means, stds**2, residual, variance, log_joint

    def data_and_score(self, path: Path, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(E[x1 | x_t = x], d/dx log p_t(x)); t broadcasts against x. Finite wherever x_t has a density."""
        a, means, variances, residual, variance, log_joint = self.components(path, x, t)
        share = torch.softmax(log_joint, dim=-1)
        data = (share * (means + a * variances * residual / variance)).sum(-1)
        return data, -(share * residual / variance).sum(-1)

    def ends(self, path: Path, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(E[x1 | x_t = x], E[x0 | x_t = x]); t broadcasts against x."""
        data, score = self.data_and_score(path, x, t)
        return data, -path.sigma(t) * score

    def log_density(self, path: Path, x: Tensor, t: Tensor) -> Tensor:
        return torch.logsumexp(self.components(path, x, t)[-1], dim=-1)

    def cdf(self, path: Path, x: Tensor, t: Tensor) -> Tensor:
        """Return the distribution function of x_t, elementwise."""
        _, _, _, residual, variance, _ = self.components(path, x, t)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return (weights * torch.special.ndtr(residual / variance.sqrt())).sum(-1)

    def score(self, path: Path, x: Tensor, t: Tensor) -> Tensor:
        """d/dx log p_t(x), by autograd through the density, so not through any formula for the ends."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.log_density(path, x, t).sum(), x)[0]

    def velocity(self, path: Path, x: Tensor, t: Tensor) -> Tensor:
        """alpha' E[x1 | x] + sigma' E[x0 | x], finite at both ends of every path."""
        data, score = self.data_and_score(path, x, t)
        a, s, da, ds = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
        # Where sigma' is infinite, sigma sigma' is not: there alpha^2 + sigma^2 = 1.
        product = torch.where(ds.isinf(), -a * da, s * ds)
        return da * data - product * score

    def on(self, path: Path) -> Velocity:
        """Return the exact velocity on ``path``, to be followed."""
        return lambda x, t: self.velocity(path, x, t)
