"""Explicit Runge-Kutta methods: a method is its Butcher tableau."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Field, Solver


def runge_kutta(
    order: int, nodes: Sequence[float], matrix: Sequence[Sequence[float]], weights: Sequence[float]
) -> Solver:
    """A Butcher tableau as a step: x + h sum_i b_i k_i with k_i = f(x + h sum_j a_ij k_j, t + c_i h)."""

    def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
        h = t_next - t
        slopes: list[Tensor] = []
        for node, row in zip(nodes, matrix, strict=True):
            # In this form nodes 0 and 1 are t and t_next exactly: rounding never steps out of [0, 1].
            slopes.append(field(combine(x, h, row, slopes), (1.0 - node) * t + node * t_next))
        return combine(x, h, weights, slopes)

    return Solver(order=order, evaluations=len(nodes), start=lambda options: step)


def combine(x: Tensor, h: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """x + h sum_i weights_i slopes_i."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = torch.add(x, slope, alpha=h * weight)
    return x


EULER = runge_kutta(1, nodes=[0], matrix=[[]], weights=[1])
HEUN = runge_kutta(2, nodes=[0, 1], matrix=[[], [1]], weights=[1 / 2, 1 / 2])
