"""Adaptive solvers: an embedded Runge-Kutta pair chooses its own steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ..predictions import UndeterminedError
from .base import Field, SolverOptions, Step

# Dormand & Prince 1980, as in Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, table II.5.2.
# The last row is also the weights of order 5: the slope at the end of a step is the first of the next one.
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
MATRIX = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
#: The weights of order 5 less those of order 4.
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
#: How near to an end where the velocity is not determined the steps lead.
NEAR = 0.005
FIRST_STEP, SAFETY, SHRINK, GROW = 0.05, 0.9, 0.2, 10.0


def dormand_prince(options: SolverOptions, *, by_row: bool = False) -> Step:
    """Dormand & Prince 1980: as many inner steps as the tolerances ask for, of sizes as in Hairer et al., sec. II.4.

    It lands on t_next and evaluates nothing beyond. Where the velocity is not determined at t_next, it stops ``NEAR``
    before, and takes Euler's step from there. The error of a step is the root mean square over the whole batch,
    so that a row's result depends, within the tolerance, on the rows beside it.

    Args:
        by_row: the error is each row's own, and so are its steps: no row depends on another. The velocity then gets
            t of shape (B,).
    """
    sizes: Tensor | None = None  # (B,), or (1,) where rows share their steps

    def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
        nonlocal sizes
        count, sign = len(x) if by_row else 1, 1.0 if t_next > t else -1.0
        # Times are float64 on the CPU, where they are compared.
        now, end = (torch.full((count,), time, dtype=torch.float64) for time in (t, t_next))
        sizes = torch.full_like(now, FIRST_STEP) if sizes is None else sizes
        largest = torch.zeros_like(now)  # of the steps that were accepted
        shape = (count,) + (1,) * (x.ndim - 1) if by_row else ()

        def wide(values: Tensor) -> Tensor:
            return values.to(x.dtype).to(x.device).reshape(shape)

        def slope(y: Tensor, time: Tensor) -> Tensor:
            at: Any = time.to(x.dtype).to(x.device) if by_row else time.item()
            return field(y, at)

        first, goal = slope(x, now), end
        while not torch.equal(now, goal):
            left = (goal - now).abs()
            taken = torch.minimum(sizes, left)
            after = torch.where(taken == left, goal, now + sign * taken)
            if bool(((after == now) & (left > 0)).any()):
                raise UserError(
                    f"dopri5 cannot meet rtol {options.rtol:g} and atol {options.atol:g} on [{t:g}, {t_next:g}]",
                    "Use larger tolerances, float32 in place of half precision, or a fixed-step solver ('heun').",
                )
            h, slopes, reached = wide(after - now), [first], x
            try:
                for node, row in zip(NODES, MATRIX, strict=True):
                    reached = x + h * _weighted(row, slopes)
                    slopes.append(slope(reached, (1.0 - node) * now + node * after))
            except UndeterminedError:
                goal = torch.where((end - now).abs() > NEAR, end - sign * NEAR, now)
                continue
            scale = options.atol + options.rtol * torch.maximum(x.abs(), reached.abs())
            errors = (h * _weighted(ERROR, slopes) / scale).detach().reshape(count, -1)
            # What overflows is no NaN here, but too large an error.
            ratio = errors.square().mean(1).sqrt().double().cpu().nan_to_num(nan=math.inf)
            accepted = ratio <= 1.0
            factor = SAFETY * ratio.clamp_min(1e-10) ** (-1 / 5)
            factor = factor.clamp(max=GROW).maximum(torch.where(accepted, 1.0, SHRINK))
            sizes, now = taken * factor, torch.where(accepted, after, now)
            largest = torch.where(accepted, torch.maximum(largest, taken), largest)
            moved = accepted.to(x.device).reshape(shape)
            x, first = torch.where(moved, reached, x), torch.where(moved, slopes[-1], first)
        sizes = largest  # the last step was cut off at t_next, which says nothing of the next one
        return x if goal is end else x + wide(end - now) * first

    return step


def _weighted(weights: Sequence[float], slopes: list[Tensor]) -> Tensor:
    """Sum of weights_i slopes_i."""
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight:
            total = torch.add(total, slope, alpha=weight)
    return total
