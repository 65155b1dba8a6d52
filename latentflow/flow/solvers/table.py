"""The table of solvers: name -> solver with its default settings."""

from __future__ import annotations

from .adaptive import dormand_prince
from .base import Solver
from .runge_kutta import runge_kutta
from .stochastic import euler_maruyama

SOLVERS: dict[str, Solver] = {
    "euler": runge_kutta(1, nodes=[0], matrix=[[]], weights=[1]),
    "midpoint": runge_kutta(2, nodes=[0, 1 / 2], matrix=[[], [1 / 2]], weights=[0, 1]),
    "heun": runge_kutta(2, nodes=[0, 1], matrix=[[], [1]], weights=[1 / 2, 1 / 2]),
    "rk4": runge_kutta(
        4,
        nodes=[0, 1 / 2, 1 / 2, 1],
        matrix=[[], [1 / 2], [0, 1 / 2], [0, 0, 1]],
        weights=[1 / 6, 1 / 3, 1 / 3, 1 / 6],
    ),
    "dopri5": Solver(order=5, evaluations=None, start=dormand_prince),
    "euler-maruyama": euler_maruyama(),
}
