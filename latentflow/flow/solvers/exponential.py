"""Exponential integrators: the part of the flow that is linear in x is solved, not stepped."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..paths import Path
from ..predictions import convert
from ..tensors import per_row
from .base import Field, SolverOptions, Step, schedule

#: A step in log-SNR that is longer than the one before by more than this is taken with first order.
_LONGEST_EXTRAPOLATION = 4.0
#: Where y moves by less in a step, rounding decides the slope of D over y.
_SHORTEST_STEP = 1e-12
#: The second-order part of an exponential Adams step is at most this share of the length of the first-order part.
_LONGEST_CORRECTION = 0.25


def dpm_solver_2m(options: SolverOptions) -> Step:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095), algorithm 2: on any path, in both directions.

    The data prediction D is extrapolated in log-SNR from the two latest evaluations: with steps h in log-SNR,
    x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) (D + h / (2 h_before) (D - D_before)).
    Without the difference it is DDIM, which, written with the noise prediction N, is alpha' D + sigma' N,
    finite at both ends.

    A step is of first order (DDIM) where the difference is of no use: in the first step; in the last step
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
        (alpha, sigma), (alpha_next, sigma_next) = schedule(path, t), schedule(path, t_next)
        h = _log_snr(path, t_next) - _log_snr(path, t)
        x = torch.add(alpha_next * data, noise, alpha=sigma_next)
        if before is not None and h / h_before <= _LONGEST_EXTRAPOLATION:
            weight = (alpha_next - alpha * sigma_next / sigma) * h / (2.0 * h_before)
            x = torch.add(x, data - before, alpha=weight)
        before, h_before = data, h
        return x

    return step


def _log_snr(path: Path, t: float) -> float:
    """Return the log-SNR at t, which may be infinite."""
    return path.log_snr(torch.tensor(t, dtype=torch.float64)).item()


def exponential_adams(options: SolverOptions, *, limited: bool = True) -> Step:
    """An exponential Adams method with a corrector that costs no evaluation; full order up to both ends.

    The data prediction D is taken as linear in y = alpha / r with r = sqrt(alpha^2 + sigma^2), as it is along the
    flow where the data is N(m, I). Unlike the log-SNR, y is finite at both ends. With D = D_n + (y - y_n) slope the
    step is

        x' = alpha' D_n + sigma' N_n + m slope,   m = r' - r sigma'/sigma - y_n (alpha' - alpha sigma'/sigma),

    where m is sigma' times the integral of y - y_n over d(alpha/sigma). The slope of a step is known only after
    the next evaluation, which corrects x for it before stepping on: the idea of UniC (Zhao et al. 2023,
    arXiv:2302.04867). Backward in time noise and data change places, so that nothing divides by 0 either.

    Where steps are too long for that, a slope says little about the next step, and D swings to and fro, which slopes
    would magnify. So each row falls back towards the first order (DDIM), which is stable with steps twice as long:

    - m slope is at most a quarter as long as h hypot(|D_n|, |N_n|), with h the root mean square of alpha' - alpha and
      sigma' - sigma: on the straight path that is the length of the step, if D_n and N_n are perpendicular;
    - where slopes turn against the ones before, twice in a row, a slope counts for no more than max(0, 1 + 2 c), with
      c < 0 the larger of the two latest cosines between successive slopes.

    Along a smooth flow in short steps neither happens, and nothing changes.

    Args:
        limited: False takes the slope whole, so that the method is linear.
    """
    path = options.path
    before: tuple[Tensor, float] | None = None  # D and y of the step before
    slopes: list[Tensor] = []  # the latest, whole
    turns: list[Tensor] = []  # the two latest cosines between successive slopes, (B,)
    taken: tuple[Tensor | None, float] = (None, 0.0)  # its slope (None for 0) and m

    def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
        nonlocal before, taken
        velocity = field(x, t)
        ends = [convert(velocity, x, t, path, "velocity", kind) for kind in ("data", "noise")]
        (alpha, sigma), (alpha_next, sigma_next) = schedule(path, t), schedule(path, t_next)
        if t_next < t:
            ends.reverse()
            alpha, sigma, alpha_next, sigma_next = sigma, alpha, sigma_next, alpha_next
        r, r_next = math.hypot(alpha, sigma), math.hypot(alpha_next, sigma_next)
        y, decay = alpha / r, sigma_next / sigma
        m = r_next - decay * r - y * (alpha_next - decay * alpha)
        x = torch.add(alpha_next * ends[0], ends[1], alpha=sigma_next)
        slope = None
        if before is not None and abs(y - before[1]) > _SHORTEST_STEP:
            slope = (ends[0] - before[0]) / (y - before[1])
            if limited:
                turns.extend(_cosine(slope, last) for last in slopes)
                slopes[:] = [slope]
                del turns[:-2]
                way = math.hypot(alpha_next - alpha, sigma_next - sigma) / math.sqrt(2.0)
                length = way * torch.hypot(_length(ends[0]), _length(ends[1]))
                share = _LONGEST_CORRECTION * length / _length(m * slope)
                if len(turns) == 2:
                    share = torch.minimum(share, (1.0 + 2.0 * torch.maximum(*turns)).clamp(min=0.0))
                slope = per_row(share.clamp(max=1.0), x) * slope
            earlier, m_before = taken
            x = torch.add(x, slope, alpha=m + decay * m_before)
            x = x if earlier is None else torch.add(x, earlier, alpha=-decay * m_before)
        before, taken = (ends[0], y), (slope, m)
        return x

    return step


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine (B,) between the rows of (B, ...); 0 where one of them is 0."""
    return (per_row(1.0 / _length(a), a) * a * b).reshape(len(a), -1).sum(1) / _length(b)


def _length(rows: Tensor) -> Tensor:
    """Return the lengths (B,) of the rows of (B, ...), and the smallest number that is not 0 in the place of 0."""
    return rows.reshape(len(rows), -1).square().sum(1).sqrt().clamp_min(torch.finfo(rows.dtype).tiny)
