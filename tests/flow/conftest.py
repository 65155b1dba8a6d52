"""Data whose flow is known exactly, and every path: x_t = alpha x1 + sigma x0 with x0 ~ N(0, 1), float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from latentflow.flow import Path

from .closed_forms import EVERY_PATH, Mixture, seeded


@pytest.fixture
def mixture() -> Mixture:
    return Mixture(weights=(0.3, 0.5, 0.2), means=(-2.0, 0.5, 3.0), stds=(0.5, 1.0, 0.3))


@pytest.fixture
def gaussian() -> Mixture:
    return Mixture(weights=(1.0,), means=(1.5,), stds=(0.4,))


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Draw standard normal float64 numbers of a shape, the same in every test."""
    generator = seeded()
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture(params=EVERY_PATH.values(), ids=list(EVERY_PATH))
def path(request: pytest.FixtureRequest) -> Path:
    """Every path: a test that takes it runs for each."""
    return request.param
