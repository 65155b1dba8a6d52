"""Where on [0, 1] to train (densities of t) and where to step when sampling (grids).

A new density is one function of given uniform numbers, and one line in ``TIME_DENSITIES``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentflow.errors import UserError, lookup


def uniform(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """t = u. It has no parameters: ``mean`` and ``std`` have no effect."""
    return u


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """t with logit(t) ~ N(mean, std^2): most training in the middle of the path.

    Esser et al. 2024 (arXiv:2403.03206), eq. 19. Their t = 1 is noise, so their mean m is -m here: a positive
    ``mean`` leans towards the data (t = 1).
    """
    if not std > 0.0:
        raise UserError(f"std of the logit-normal density is {std}", "Use a positive number; 1 is usual.")
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


TIME_DENSITIES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "uniform": uniform,
    "logit-normal": logit_normal,
}


def sample_times(name: str, u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Training times of the density ``name``, by its quantile function at the uniform numbers ``u``.

    The caller draws ``u``, so that each sample's t may come from its own seed (and stratified or
    low-discrepancy numbers work unchanged).

    Args:
        name: a key of ``TIME_DENSITIES``.
        u: uniform numbers in [0, 1], any shape.
        mean, std: parameters of the density, where it has them.

    Returns:
        float64, shaped like u, in [0, 1].

    Raises:
        UserError: unknown name (the nearest is suggested) or std <= 0.
        ValueError: u is outside [0, 1].
    """
    density = lookup(TIME_DENSITIES, name, "time density")
    u = u.to(torch.float64)
    if not bool(((u >= 0) & (u <= 1)).all()):
        raise ValueError(
            f"u must be uniform numbers in [0, 1] (torch.rand), but spans [{u.min():g}, {u.max():g}]"
        )
    return density(u, mean, std)


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Sampling times from 0 (noise) to 1 (data): ``steps`` steps, so ``steps`` + 1 times, float64.

    ``shift`` > 1 spends more steps near the noise, as large images need: with sigma = 1 - t,
    sigma' = shift sigma / (1 + (shift - 1) sigma). Esser et al. 2024 (arXiv:2403.03206), eq. 23.

    Raises:
        UserError: steps < 1 or shift <= 0.
    """
    if steps < 1:
        raise UserError(f"{steps} sampling steps", "Use at least 1; 20 to 50 are usual.")
    if not 0.0 < shift < float("inf"):
        raise UserError(f"time shift {shift}", "Use a positive number; 1 is the uniform grid.")
    t = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
    # 1 - sigma' written in t: no cancellation, and exactly 0 and 1 at the ends.
    return t / (t + shift * (1.0 - t))
