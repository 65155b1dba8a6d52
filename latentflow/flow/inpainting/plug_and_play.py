"""Denoising and noising in turn, the known region replaced in the denoised image."""

from __future__ import annotations

from torch import Tensor

from ..paths import Path
from ..predictions import convert
from ..solvers import Solver
from ..solvers.base import Field, SolverOptions, Step, schedule
from ..tensors import Generators, Velocity, normal_like
from .base import Callback, Progress, Times, prepare, refuse_solver


def pnp_flow(
    velocity: Velocity,
    x0: Tensor,
    known: Tensor,
    mask: Tensor,
    times: Times,
    *,
    solver: str | Solver | None = None,
    path: Path | None = None,
    generator: Generators = None,
    callback: Callback | None = None,
    progress: Progress = False,
) -> Tensor:
    """Denoise, put the known region in place, and noise again, all of it, for the next step.

    PnP-Flow, Martin et al. 2024 (arXiv:2410.02423), algorithm 3, for a mask without noise, where the gradient step on
    |known - data|^2 with step size 1 is to put the known values in place:

        D = (1 - t-th denoiser at x_t), with the known values;   x_t' = alpha' D + sigma' z,  z ~ N(0, 1) fresh.

    The hole is averaged over noises on the way. It ends smooth, and near the conditional mean; a method for one
    good answer (the highest PSNR), not for samples of all of them.

    Cost: len(times) - 1 evaluations.

    Args:
        velocity, x0, known, mask, times, path, generator, callback, progress: as ``repaint``.
        solver: none: the steps are its own.

    Returns: as ``repaint``.

    Raises:
        UserError: a solver is given; and as ``integrate``.
        ValueError: as ``repaint``.
    """
    refuse_solver("pnp-flow", solver)
    problem = prepare(velocity, x0, known, mask, times, path, generator, callback, progress)

    def start(options: SolverOptions) -> Step:
        def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
            predicted = convert(field(x, t), x, t, options.path, "velocity", "data")
            alpha, sigma = schedule(options.path, t_next)
            data = problem.known.put(predicted, problem.known.values)
            return alpha * data + sigma * normal_like(x, options.generator)

        return step

    return problem.follow(Solver(order=1, evaluations=1, start=start, stochastic=True), problem.known.finish)
