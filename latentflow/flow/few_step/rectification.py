"""Rectification: straighten a flow by training again on the pairs (noise, data that the flow makes of it).

Liu et al. 2022 (arXiv:2209.03003). The pairs of one flow, coupled as they are ("data-dependent"), train the next::

    x0, x1 = reflow_pairs(velocity, noise, time_grid(100))
    sample = CondOT().sample(x0[rows], x1[rows], t)  # the labels of the noise rows are the labels of the pairs
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..solvers import Solver, Times, find_solver, integrate
from ..tensors import Velocity, compute_dtype


def reflow_pairs(
    velocity: Velocity,
    x0: Tensor,
    times: Times,
    solver: str | Solver = "heun",
    *,
    batch_size: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return the coupling (Z_0, Z_1) that the flow induces: ``x0`` and the data generated from it, row by row.

    Liu et al. 2022 (arXiv:2209.03003), algorithm 1 ("Reflow"). Rows stay where they are, so that labels,
    captions and seeds of the rows of ``x0`` belong to the pairs.

    Args:
        velocity: (x, t) -> dx/dt, perhaps guided.
        x0: (B, ...) at times[0]: noise as the flow starts from it (``path.start(noise)`` on a path that scales it).
        times, solver: as in ``integrate``. A stochastic solver forgets x0 on its way: its pairs are samples, but not
            the map of the flow.
        batch_size: rows to integrate at a time; default all. A velocity bound to one condition per row of x0
            fits only all of them: call once per batch instead.
        options: of ``integrate``: path, rtol, atol, generator, progress.

    Returns:
        (x0, x1), both (B, ...), without a graph.

    Raises:
        ValueError: batch_size < 1.
        UserError, ValueError: as in ``integrate``.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: pass at least 1, or None for all rows at once")
    x0 = x0.detach()
    with torch.no_grad():
        batches = x0.split(batch_size or max(len(x0), 1))
        return x0, torch.cat([integrate(velocity, rows, times, solver, **options) for rows in batches])


def straightness(
    velocity: Velocity,
    x0: Tensor,
    times: Times,
    solver: str | Solver = "heun",
    **options: Any,
) -> Tensor:
    """Return S = int_0^1 |(z_1 - z_0) - dz_t/dt|^2 dt of the trajectory from each row; 0 where it is straight.

    Liu et al. 2022 (arXiv:2209.03003), sec. 2.2; their S(Z) is the mean over rows. dz/dt is the slope of each
    step's chord, which costs no evaluation beyond the solver's own: the midpoint rule, so of second order in
    the step with a solver of order 2 or more (and always a little below S), of first order with Euler.

    Args:
        velocity, x0, times, solver: as in ``integrate``; at least two steps, better 20 and more. On another interval
            than [0, 1] it is the mean of the squared deviation from the mean slope.
        options: of ``integrate``: path, rtol, atol.

    Returns:
        (B,), summed over all elements of a row, float32 or better, without a graph.

    Raises:
        UserError: the solver is stochastic: its trajectories have no slope.
        ValueError: fewer than two steps, which are always straight.
        UserError, ValueError: as in ``integrate``.
    """
    solver = find_solver(solver, "its trajectories have no slope")
    if len(times) < 3:
        raise ValueError(f"straightness takes at least 2 steps, 3 times, not {len(times)} times")
    points = [x0]
    with torch.no_grad():
        integrate(velocity, x0, times, solver, callback=lambda i, t, x: points.append(x), **options)
        z = torch.stack(points).to(compute_dtype(x0)).flatten(2)  # (N + 1, B, D)
        h = torch.as_tensor(times, dtype=torch.float64, device="cpu").diff().to(z)[:, None, None]
        deviation = z.diff(dim=0) / h - (z[-1] - z[0]) / h.sum()
        return (h / h.sum() * deviation.square()).sum((0, 2))
