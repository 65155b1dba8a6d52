"""The 2-D distributions and the transport tasks between them.

Every sample is drawn independently (no ordered points along a curve), by the torch generator alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

#: (number of points, generator) -> (n, 2).
Distribution: TypeAlias = Callable[[int, torch.Generator], Tensor]

#: Means and standard deviation of the 8 Gaussians: radius 5, covariance sqrt(0.1) I, as in torchcfm.
MODES = 5.0 * torch.stack([torch.tensor([math.cos(a), math.sin(a)]) for a in torch.arange(8) * math.pi / 4])
MODE_STD = 0.1**0.25


def normal(n: int, generator: torch.Generator) -> Tensor:
    """N(0, I)."""
    return torch.randn(n, 2, generator=generator)


def eight_gaussians(n: int, generator: torch.Generator) -> Tensor:
    """Eight equally likely Gaussians on a circle."""
    mode = torch.randint(8, (n,), generator=generator)
    return MODES[mode] + MODE_STD * torch.randn(n, 2, generator=generator)


def moons(n: int, generator: torch.Generator) -> Tensor:
    """Two half circles, smeared along the diagonal by one uniform number in [0, 0.2], as in torchdyn; 3 x - 1."""
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.rand(n, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1.0 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    smear = 0.2 * torch.rand(n, generator=generator)
    return 3.0 * torch.stack([x + smear, y + smear], dim=1) - 1.0


def s_curve(n: int, generator: torch.Generator) -> Tensor:
    """Two arcs of a circle that make an S, with noise 0.05, times 1.5: scikit-learn's curve seen from the side."""
    angle = 3.0 * math.pi * (torch.rand(n, generator=generator) - 0.5)
    curve = torch.stack([angle.sin(), angle.sign() * (angle.cos() - 1.0)], dim=1)
    return 1.5 * (curve + 0.05 * torch.randn(n, 2, generator=generator))


class Task(NamedTuple):
    """Move ``source`` to ``target``."""

    title: str
    source: Distribution
    target: Distribution


TASKS: dict[str, Task] = {
    "normal-8gaussians": Task("N → 8 Gaussians", normal, eight_gaussians),
    "moons-8gaussians": Task("moons → 8 Gaussians", moons, eight_gaussians),
    "normal-moons": Task("N → moons", normal, moons),
    "normal-scurve": Task("N → S-curve", normal, s_curve),
    "8gaussians-moons": Task("8 Gaussians → moons", eight_gaussians, moons),
}
