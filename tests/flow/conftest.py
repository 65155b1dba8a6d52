"""Closed forms that everything in flow must meet: x_t = alpha x1 + sigma x0 with x0 ~ N(0, 1), float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from latentflow.flow import Path


@dataclass(frozen=True)
class Mixture:
    """x1 ~ sum_k weights_k N(means_k, stds_k^2), independently in every element of x.

    Posterior expectations given x_t = x by responsibilities: nothing divides by alpha or sigma.
    """

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def ends(self, path: Path, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(E[x1 | x_t = x], E[x0 | x_t = x]); t broadcasts against x."""
        a, s = path.alpha(t)[..., None], path.sigma(t)[..., None]
        weights, means, stds = (
            torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means, self.stds)
        )
        variance = a**2 * stds**2 + s**2  # (..., K)
        residual = x[..., None] - a * means
        share = torch.softmax(weights.log() - 0.5 * variance.log() - 0.5 * residual**2 / variance, dim=-1)
        data = (share * (means + a * stds**2 * residual / variance)).sum(-1)
        noise = (share * s * residual / variance).sum(-1)
        return data, noise

    def score(self, path: Path, x: Tensor, t: Tensor) -> Tensor:
        """d/dx log p_t(x), by autograd through the density, so not through any formula for the ends."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            a, s = path.alpha(t)[..., None], path.sigma(t)[..., None]
            weights, means, stds = (
                torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means, self.stds)
            )
            std = (a**2 * stds**2 + s**2).sqrt()
            logp = torch.logsumexp(
                weights.log() - std.log() - 0.5 * ((x[..., None] - a * means) / std) ** 2, dim=-1
            )
            return torch.autograd.grad(logp.sum(), x)[0]

    def velocity(self, path: Path, x: Tensor, t: Tensor) -> Tensor:
        data, noise = self.ends(path, x, t)
        return path.d_alpha(t) * data + path.d_sigma(t) * noise


@pytest.fixture
def mixture() -> Mixture:
    return Mixture(weights=(0.3, 0.5, 0.2), means=(-2.0, 0.5, 3.0), stds=(0.5, 1.0, 0.3))


@pytest.fixture
def gaussian() -> Mixture:
    return Mixture(weights=(1.0,), means=(1.5,), stds=(0.4,))


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Standard normal float64 numbers of a shape, the same in every test."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
