"""Exponential integrators: the part of the flow that is linear in x is solved, not stepped."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..paths import Path
from ..predictions import convert
from .base import Field, SolverOptions, Step

#: A step in log-SNR that is longer than the one before by more than this is taken with first order.
_LONGEST_EXTRAPOLATION = 4.0


def dpm_solver_2m(options: SolverOptions) -> Step:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095), algorithm 2: on any path, in both directions.

    The data prediction D is extrapolated in log-SNR from the two latest evaluations: with steps h in log-SNR,
    x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) (D + h / (2 h_before) (D - D_before)).
    What precedes the difference is DDIM, and written with the noise prediction N it is alpha' D + sigma' N,
    finite at both ends.

    A step is of first order (DDIM) where the difference says nothing: in the first step; in the last step
    into an end of the path where log-SNR is infinite, or so large that h > 4 h_before; and in the second step out
    of such an end, where h_before is infinite.
    """
    path = options.path
    before: Tensor | None = None
    h_before = math.nan

    def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
        nonlocal before, h_before
        velocity = field(x, t)
        data = convert(velocity, x, t, path, "velocity", "data")
        noise = convert(velocity, x, t, path, "velocity", "noise")
        (alpha, sigma, log_snr), (alpha_next, sigma_next, log_snr_next) = _at(path, t), _at(path, t_next)
        h = log_snr_next - log_snr
        x = torch.add(alpha_next * data, noise, alpha=sigma_next)
        if before is not None and h / h_before <= _LONGEST_EXTRAPOLATION:
            weight = (alpha_next - alpha * sigma_next / sigma) * h / (2.0 * h_before)
            x = torch.add(x, data - before, alpha=weight)
        before, h_before = data, h
        return x

    return step


def _at(path: Path, t: float) -> tuple[float, float, float]:
    """alpha, sigma and the log-SNR, which may be infinite."""
    at = torch.tensor(t, dtype=torch.float64)
    return path.alpha(at).item(), path.sigma(at).item(), path.log_snr(at).item()
