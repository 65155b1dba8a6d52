"""The table of solvers: name -> solver with its default settings."""

from __future__ import annotations

from functools import partial

from .adaptive import dormand_prince
from .base import EULER, HEUN, Solver, runge_kutta
from .exponential import dpm_solver_2m, exponential_adams
from .multistep import adams_bashforth
from .stochastic import churn, ddpm, euler_maruyama, langevin, stochastic_heun

SOLVERS: dict[str, Solver] = {
    "euler": EULER,
    "midpoint": runge_kutta(2, nodes=[0, 1 / 2], matrix=[[], [1 / 2]], weights=[0, 1]),
    "heun": HEUN,
    "ralston": runge_kutta(2, nodes=[0, 2 / 3], matrix=[[], [2 / 3]], weights=[1 / 4, 3 / 4]),
    "rk4": runge_kutta(
        4,
        nodes=[0, 1 / 2, 1 / 2, 1],
        matrix=[[], [1 / 2], [0, 1 / 2], [0, 0, 1]],
        weights=[1 / 6, 1 / 3, 1 / 3, 1 / 6],
    ),
    "adams-bashforth-2": adams_bashforth(2),
    "adams-bashforth-3": adams_bashforth(3),
    "dpm-solver++2m": Solver(order=2, evaluations=1, start=dpm_solver_2m),
    "exponential-adams": Solver(order=2, evaluations=1, start=exponential_adams),
    "dopri5": Solver(order=5, evaluations=None, start=dormand_prince),
    "euler-maruyama": euler_maruyama(),
    "stochastic-heun": stochastic_heun(),
    "ddpm": ddpm(),
    "churn": churn(),
    "langevin": langevin(),
}

#: Variants of entries that otherwise couple the rows of a batch: here each row has its own steps, and none
#: depends on another. The velocity must take t of shape (B,).
BY_ROW: dict[str, Solver] = {
    "dopri5": Solver(order=5, evaluations=None, start=partial(dormand_prince, by_row=True)),
}
