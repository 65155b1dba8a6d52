"""How far generated points are from the target, and how long their way was."""

from __future__ import annotations

import torch
from torch import Tensor

from latentflow.flow import Velocity, integrate, time_grid
from latentflow.utils.libraries import missing

from .distributions import MODES


def wasserstein2_squared(x: Tensor, y: Tensor) -> float:
    """W2^2 between two sets of points, (n, 2) and (m, 2): the exact optimal transport of their squared distances."""
    try:
        import ot
    except ImportError as error:
        raise missing("exact transport needs", "pot") from error
    cost = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    return float(ot.emd2([], [], cost.numpy(), numItermax=100_000_000))


def mode_metrics(x: Tensor, y: Tensor) -> tuple[float, float]:
    """(within-mode W2, share of the mass in wrong modes) of ``x`` against a sample ``y`` of the 8 Gaussians.

    Both are split by the nearest mode. W2 is the root of the mean over modes of W2^2 inside each, which sampling
    noise in the number of points per mode does not reach. The share is the total variation between the
    fractions of x and 1/8 each; for n points of the target it is about 0.93 / sqrt(n).
    """
    near_x, near_y = (torch.cdist(points, MODES).argmin(1) for points in (x, y))
    within = [
        wasserstein2_squared(x[near_x == k], y[near_y == k]) if bool((near_x == k).any()) else float("nan")
        for k in range(len(MODES))
    ]
    shares = torch.bincount(near_x, minlength=len(MODES)) / len(x)
    missing = 0.5 * (shares - 1.0 / len(MODES)).abs().sum()
    return float(torch.tensor(within).mean().sqrt()), float(missing)


def euler(velocity: Velocity, x0: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The end points of ``steps`` Euler steps from x0 (B, 2), and the path energy int |v|^2 dt of each row, (B,)."""
    energy, last = torch.zeros(len(x0)), x0

    def add(index: int, t: Tensor, x: Tensor) -> None:
        nonlocal energy, last
        energy = energy + (x - last).square().sum(1) * steps  # |v dt|^2 / dt
        last = x

    with torch.no_grad():
        x1 = integrate(velocity, x0, time_grid(steps), "euler", callback=add)
    return x1, energy


def normalized_path_energy(energy: float, w2_squared: float) -> float:
    """|E int |v|^2 dt - W2^2| / W2^2: 0 for optimal transport (Tong et al. 2023, arXiv:2302.00482)."""
    return abs(energy - w2_squared) / w2_squared
