"""The mathematics of flow matching: paths, couplings, predictions, times, objectives, solvers, guidance.

Conventions: t = 0 is noise (x0), t = 1 is data (x1), x_t = alpha(t) x1 + sigma(t) x0, velocity = d x_t / dt.
"""

from __future__ import annotations

from .bridges import BridgeSample as BridgeSample
from .bridges import SchrodingerBridge as SchrodingerBridge
from .bridges import bridge_matching_loss as bridge_matching_loss
from .couplings import COUPLINGS as COUPLINGS
from .couplings import ConditionalOptimalTransport as ConditionalOptimalTransport
from .couplings import Coupling as Coupling
from .couplings import DataDependent as DataDependent
from .couplings import Independent as Independent
from .couplings import OptimalTransport as OptimalTransport
from .couplings import Sinkhorn as Sinkhorn
from .editing import EDITING as EDITING
from .editing import flow_edit as flow_edit
from .editing import inversion_edit as inversion_edit
from .editing import slerp as slerp
from .guidance import guide as guide
from .guidance import guide_batched as guide_batched
from .inpainting import DEFAULT_INPAINTING as DEFAULT_INPAINTING
from .inpainting import INPAINTING as INPAINTING
from .likelihood import bits_per_dim as bits_per_dim
from .likelihood import log_likelihood as log_likelihood
from .objectives import OBJECTIVES as OBJECTIVES
from .objectives import flow_matching_loss as flow_matching_loss
from .paths import PATHS as PATHS
from .paths import CondOT as CondOT
from .paths import Path as Path
from .paths import PathSample as PathSample
from .paths import Polynomial as Polynomial
from .paths import SqrtPath as SqrtPath
from .paths import Trigonometric as Trigonometric
from .paths import VarianceExploding as VarianceExploding
from .paths import VariancePreserving as VariancePreserving
from .predictions import PREDICTIONS as PREDICTIONS
from .predictions import as_velocity as as_velocity
from .predictions import change_path as change_path
from .predictions import convert as convert
from .rectification import reflow_pairs as reflow_pairs
from .rectification import straightness as straightness
from .solvers import DIFFUSIONS as DIFFUSIONS
from .solvers import SOLVERS as SOLVERS
from .solvers import Counted as Counted
from .solvers import Solver as Solver
from .solvers import adams_bashforth as adams_bashforth
from .solvers import churn as churn
from .solvers import ddpm as ddpm
from .solvers import euler_maruyama as euler_maruyama
from .solvers import integrate as integrate
from .solvers import langevin as langevin
from .solvers import runge_kutta as runge_kutta
from .solvers import stochastic_heun as stochastic_heun
from .tables import make as make
from .tensors import Velocity as Velocity
from .times import TIME_DENSITIES as TIME_DENSITIES
from .times import TIME_GRIDS as TIME_GRIDS
from .times import Beta as Beta
from .times import CosineMap as CosineMap
from .times import LogitNormal as LogitNormal
from .times import Mode as Mode
from .times import Power as Power
from .times import TimeDensity as TimeDensity
from .times import UniformTimes as UniformTimes
from .times import time_grid as time_grid
from .transport import assignment as assignment
from .transport import sinkhorn_plan as sinkhorn_plan
from .weightings import WEIGHTINGS as WEIGHTINGS
from .weightings import Weighting as Weighting
from .weightings import loss_factor as loss_factor
