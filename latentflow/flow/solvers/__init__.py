"""Solvers: one step from t to t_next, and the one loop ``integrate`` that takes the steps.

A new Runge-Kutta method is one tableau in ``SOLVERS`` (table.py). Any other method is one function
``start(options) -> step``, called once per integration: the variables it closes over are its memory (a multistep
history, a generator for noise). A method with settings is a factory that returns a ``Solver``.
"""

from __future__ import annotations

from .base import Counted as Counted
from .base import Field as Field
from .base import Solver as Solver
from .base import SolverOptions as SolverOptions
from .base import Step as Step
from .base import runge_kutta as runge_kutta
from .diffusions import DIFFUSIONS as DIFFUSIONS
from .diffusions import Diffusion as Diffusion
from .integrate import Callback as Callback
from .integrate import Progress as Progress
from .integrate import Times as Times
from .integrate import find_solver as find_solver
from .integrate import integrate as integrate
from .multistep import adams_bashforth as adams_bashforth
from .non_stationary import NonStationary as NonStationary
from .stochastic import churn as churn
from .stochastic import ddpm as ddpm
from .stochastic import euler_maruyama as euler_maruyama
from .stochastic import langevin as langevin
from .stochastic import stochastic_heun as stochastic_heun
from .table import BY_ROW as BY_ROW
from .table import SOLVERS as SOLVERS
