"""Methods that put the known region in place along the path: plainly, with time travel, in the predicted data."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from ...errors import UserError
from ..predictions import convert
from ..solvers import Solver
from ..solvers.base import Field, SolverOptions, Step, schedule
from ..solvers.integrate import progress_over
from ..solvers.stochastic import renoise
from ..tensors import normal_like
from .base import InpaintProblem


def replacement(problem: InpaintProblem, solver: str | Solver) -> Tensor:
    """Put the known region on its own path, alpha known + sigma x0 with its part of x0, before each step.

    Song et al. 2021 (arXiv:2011.13456), app. I.2, for a deterministic flow. The hole sees the known region only
    at its own noise level, and early decisions are never revised: so there are seams, and samples do not follow the
    conditional distribution.

    Cost: as many evaluations as the solver takes without a mask.
    """
    noise = problem.known.noise(problem.x, problem.times[0])
    return problem.follow(solver, lambda x, t: problem.known.hold(x, noise, t))


def repaint(problem: InpaintProblem, solver: str | Solver, *, jump: int = 1, resamplings: int = 5) -> Tensor:
    """Replace with time travel: after ``jump`` steps add noise, which leads back, and take them again.

    RePaint, Lugmayr et al. 2022 (arXiv:2201.09865), algorithm 1 and app. B, for a flow: from t' back to t,

        x_t = (alpha/alpha') x_t' + sqrt(sigma^2 - (alpha sigma'/alpha')^2) z,

    keeps the marginals of the path and gives the known region fresh noise. Each passage lets the hole and the known
    region agree better. In the limit of many resamplings of small jumps the hole follows p(hole | known).

    Cost: as many steps as ``replacement`` takes, len(times) - 1: passages take the place of a fine grid.
    ``times`` gives start, end and spacing; the steps run on a grid that is about ``resamplings`` times coarser,
    and the t that the callback gets goes back at times. The first jump is made once, since it would
    lead back to pure noise.

    Args:
        jump: steps in a passage, at least 1.
        resamplings: passages through each jump, at least 1; 1 is ``replacement``.
    """
    for name, value in (("jump", jump), ("resamplings", resamplings)):
        if value < 1:
            raise UserError(
                f"{name} {value} of the inpainting method 'repaint'", "Use a whole number from 1."
            )
    x, count = problem.x, len(problem.times) - 1
    indices, done = iter(progress_over(problem.progress, range(count))), 0
    for start, end, steps, again in _passages(count, jump, resamplings):
        grid = [_between(problem.times, start + (end - start) * k / steps) for k in range(steps + 1)]
        first = done

        def shifted(index: int, t: Tensor, y: Tensor, first: int = first) -> Tensor | None:
            return problem.callback and problem.callback(first + index, t, y)

        # zip asks the steps first: the shared bar moves by as many as there are.
        passage = replace(
            problem,
            x=x,
            times=grid,
            callback=shifted,
            progress=lambda own: (k for k, _ in zip(own, indices, strict=False)),
        )
        x = replacement(passage, solver).to(x)
        done += steps
        if again:
            x = renoise(x, grid[-1], grid[0], problem.known.path, problem.generator)
    list(indices)  # lets a bar close
    return x.to(problem.dtype)


def _passages(count: int, jump: int, resamplings: int) -> list[tuple[float, float, int, bool]]:
    """(start, end, steps, whether it is repeated) of each; start and end as places in the grid of ``count`` steps."""
    passages = math.ceil(count / jump)
    steps = _shares(count, passages)
    jumps = [1, *_shares(passages - 1, math.ceil((passages - 1) / resamplings))]
    plan: list[tuple[float, float, int, bool]] = []
    for number, times in enumerate(jumps):
        start, end = (count * (number + side) / len(jumps) for side in (0, 1))
        for k in range(times):
            plan.append((start, end, steps[len(plan)], k < times - 1))
    return plan


def _shares(total: int, parts: int) -> list[int]:
    """``total`` in whole parts that differ by 1 at most."""
    return [total * (k + 1) // parts - total * k // parts for k in range(parts)]


def _between(times: list[float], place: float) -> float:
    """The time at a place that is no whole number, such as 2.5, by linear interpolation."""
    low = min(int(place), len(times) - 2)
    return times[low] + (place - low) * (times[low + 1] - times[low])


def pnp_flow(problem: InpaintProblem) -> Tensor:
    """Denoise, put the known region in place, and noise again, all of it, for the next step.

    PnP-Flow, Martin et al. 2024 (arXiv:2410.02423), algorithm 3, for known values without noise, where the gradient
    step on |known - data|^2 with step size 1 puts the known values in place:

        D = the data predicted at x_t, with the known values;   x_t' = alpha' D + sigma' z,  z ~ N(0, 1) fresh.

    The hole is averaged over noises on the way, and so ends smooth, near the conditional mean. Use it for one good
    answer (the highest PSNR), not to sample the possible answers.

    Cost: len(times) - 1 evaluations.
    """

    def start(options: SolverOptions) -> Step:
        def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
            predicted = convert(field(x, t), x, t, options.path, "velocity", "data")
            alpha, sigma = schedule(options.path, t_next)
            data = problem.known.put(predicted, problem.known.values)
            return alpha * data + sigma * normal_like(x, options.generator)

        return step

    return problem.take_steps(start)
