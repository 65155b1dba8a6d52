"""The known region is replaced along the path: plainly, and with time travel."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from ...errors import UserError
from ..paths import Path
from ..solvers import Solver
from ..solvers.base import schedule
from ..solvers.integrate import progress_over
from ..tensors import Generators, Velocity, normal_like
from .base import Callback, InpaintProblem, Progress, Times, prepare


def replacement(
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
    """The known region is put on its own straight way, alpha known + sigma x0 with its part of x0, before each step.

    Song et al. 2021 (arXiv:2011.13456), app. I.2, for a deterministic flow. The hole sees the known region only as
    noisy as itself, and what it has settled early is never revised: seams, and not the conditional distribution.

    Cost: as many evaluations as the solver takes without a mask.

    Args: as ``repaint``. solver: any; default "heun".
    """
    problem = prepare(velocity, x0, known, mask, times, path, generator, callback, progress)
    return _replaced(problem, solver or "heun")


def _replaced(problem: InpaintProblem, solver: str | Solver) -> Tensor:
    noise = problem.known.noise(problem.x, problem.times[0])
    return problem.follow(solver, lambda x, t: problem.known.hold(x, noise, t))


def repaint(
    velocity: Velocity,
    x0: Tensor,
    known: Tensor,
    mask: Tensor,
    times: Times,
    *,
    solver: str | Solver | None = None,
    jump: int = 1,
    resamplings: int = 5,
    path: Path | None = None,
    generator: Generators = None,
    callback: Callback | None = None,
    progress: Progress = False,
) -> Tensor:
    """Replacement with time travel: after ``jump`` steps noise is added that leads back, and they are taken again.

    RePaint, Lugmayr et al. 2022 (arXiv:2201.09865), algorithm 1 and app. B, for a flow: from t' back to t,

        x_t = (alpha/alpha') x_t' + sqrt(sigma^2 - (alpha sigma'/alpha')^2) z,

    keeps the marginals of the path and gives the known region fresh noise. Each passage lets the hole and the known
    region agree better. In the limit of many resamplings of small jumps the hole follows, at the last, p(hole | known).

    Cost: as many steps as ``replacement`` takes, len(times) - 1: passages take the place of a fine grid.
    ``times`` gives start, end and spacing; the steps run on a grid that is about ``resamplings`` times coarser,
    and the t that the callback gets goes back at times. The first jump is made once, since it would
    lead back to pure noise.

    Args:
        velocity: (x, t) -> dx/dt.
        x0: (B, C, h, w) noise at times[0] = 0, or the state of the path at times[0] > 0.
        known: (B, C, h, w), read where the mask is 0 only.
        mask: (B, 1, h, w) or broadcastable to x0; above 0 = repaint.
        times: N + 1 increasing times in [0, 1].
        solver: any; default "euler".
        jump: steps in a passage, at least 1.
        resamplings: passages through each jump, at least 1; 1 is ``replacement``.
        path: of the velocity; default: the straight path.
        generator: for the noise; a list with one for each row makes every row independent of the others.
        callback, progress: as of ``integrate``. A tensor that the callback returns replaces x in the hole.

    Returns:
        x at times[-1]; where sigma is 0 there (t = 1), its known region is exactly ``known``.

    Raises:
        UserError: jump or resamplings below 1; and as ``integrate``.
        ValueError: shapes that do not fit, or times that do not increase.
    """
    for name, value in (("jump", jump), ("resamplings", resamplings)):
        if value < 1:
            raise UserError(
                f"{name} {value} of the inpainting method 'repaint'", "Use a whole number from 1."
            )
    problem = prepare(velocity, x0, known, mask, times, path, generator, callback, progress)
    x, count = problem.x, len(problem.times) - 1
    indices, done = iter(progress_over(progress, range(count))), 0
    for start, end, steps, again in _passages(count, jump, resamplings):
        grid = [_between(problem.times, start + (end - start) * k / steps) for k in range(steps + 1)]
        first = done

        def shifted(index: int, t: Tensor, y: Tensor, first: int = first) -> Tensor | None:
            return None if callback is None else callback(first + index, t, y)

        # zip asks the steps first: the shared bar moves by as many as there are.
        passage = replace(
            problem,
            x=x,
            times=grid,
            callback=shifted,
            progress=lambda own: (k for k, _ in zip(own, indices, strict=False)),
        )
        x = _replaced(passage, solver or "euler").to(x)
        done += steps
        if again:
            x = _noised(problem, x, grid[-1], grid[0])
    for _ in indices:  # lets a bar close
        pass
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


def _noised(problem: InpaintProblem, x: Tensor, t: float, back: float) -> Tensor:
    (alpha, sigma), (alpha_back, sigma_back) = (
        schedule(problem.known.path, t),
        schedule(problem.known.path, back),
    )
    shrink = alpha_back / alpha
    return shrink * x + math.sqrt(sigma_back**2 - (shrink * sigma) ** 2) * normal_like(x, problem.generator)
