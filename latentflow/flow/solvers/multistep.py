"""Adams-Bashforth methods: one evaluation a step, and the slopes of the steps before."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .base import Field, Solver, SolverOptions, Step, combine


def adams_bashforth(order: int) -> Solver:
    """The explicit Adams method: x plus the integral of the polynomial through the last ``order`` slopes.

    Its weights come from the actual times, so any grid will do (Hairer, Norsett & Wanner, Solving Ordinary
    Differential Equations I, sec. III.5). While there are fewer slopes, each step integrates the polynomial through
    all of them from the very first time on, and so corrects the errors of the lower orders before it: this
    start keeps the order without a second evaluation in any step.

    Slopes of earlier steps stay in use when a callback replaces x: as long as what it does is smooth in t
    (inpainting, guidance), the order holds; a sudden jump costs an error of the size of one step.

    Raises:
        ValueError: order is not 1, 2, 3 or 4.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(
            f"Adams-Bashforth of order {order}: pass 1, 2, 3 or 4 (5 and more are hardly stable)"
        )

    def start(options: SolverOptions) -> Step:
        times: list[float] = []
        slopes: list[Tensor] = []
        included: list[float] = []  # weights with which x holds the slopes already, while there are few

        def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
            slopes.append(field(x, t))
            times.append(t)
            if len(times) > order:
                del times[0], slopes[0]
            few = len(times) == len(included) + 1
            weights = _integrals(times, times[0] if few else t, t_next)
            missing = [w - had for w, had in zip(weights, [*included, 0.0], strict=True)] if few else weights
            if few:
                included[:] = weights
            return combine(x, 1.0, missing, slopes)

        return step

    return Solver(order=order, evaluations=1, start=start)


def _integrals(nodes: Sequence[float], a: float, b: float) -> list[float]:
    """The integrals from a to b of the Lagrange polynomials of the nodes, at most four."""
    middle, half = (a + b) / 2, (b - a) / 2
    # Gauss-Legendre with two points: exact up to degree three.
    points = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))

    def lagrange(j: int, s: float) -> float:
        return math.prod((s - u) / (nodes[j] - u) for i, u in enumerate(nodes) if i != j)

    return [half * sum(lagrange(j, s) for s in points) for j in range(len(nodes))]
