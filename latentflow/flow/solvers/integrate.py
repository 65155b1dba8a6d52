"""The one loop that takes a solver's steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...errors import UserError, lookup
from ..paths import CondOT, Path
from ..predictions import UndeterminedError, undetermined_refused
from ..tensors import NOT_FINITE, Generators, Velocity, compute_dtype, require_finite, with_time_rows
from ..times import checked_times
from .base import Counted, Field, Solver, SolverOptions
from .exponential import dpm_solver_2m
from .table import SOLVERS

Times: TypeAlias = Tensor | Sequence[float]
#: (step index, t reached, x) -> x in its place, or None to leave it.
Callback: TypeAlias = Callable[[int, Tensor, Tensor], Tensor | None]
#: True for a progress bar, or a function that wraps the step indices, such as ``tqdm``.
Progress: TypeAlias = bool | Callable[[Iterable[int]], Iterable[int]]


def integrate(
    velocity: Velocity,
    x: Tensor,
    times: Times,
    solver: str | Solver = "heun",
    *,
    path: Path | None = None,
    score: Velocity | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    callback: Callback | None = None,
    progress: Progress = False,
    generator: Generators = None,
) -> Tensor:
    """Follow dx/dt = velocity(x, t) from ``times[0]`` to ``times[-1]``.

    Where a prediction does not determine the velocity of ``as_velocity`` (data: at t = 1; noise and score: at t = 0) a
    solver's step that would ask for it at its end is one of DDIM instead, Euler's on the straight path, which lands on
    the prediction; a step that starts there takes the velocity of its own end, and of 0.05 away at most. On the
    straight path both keep the global order up to the second.

    Args:
        velocity: (x, t) -> dx/dt. It gets x in the given dtype and t as a scalar tensor, an ``nn.Module`` as (B,);
            float32 or (where x is) float64. It is evaluated only within [times[0], times[-1]].
        x: (B, ...) at times[0], floating point. Half precision is summed up in float32 between evaluations.
        times: N + 1 times make N steps; strictly increasing (noise to data) or decreasing (data to noise), in
            [0, 1]. An adaptive solver lands on each of them, so [0, 1] is its cheapest grid.
        solver: a key of ``SOLVERS``, or a ``Solver`` made by one of the factories behind it.
        path: the path that the velocity belongs to, for the solvers that need it (exponential, stochastic);
            default: the straight path, ``CondOT()``.
        score: (x, t) -> the score, for stochastic solvers where it does not follow from the velocity (a
            Schrodinger bridge); default: from the same velocity evaluation, through the path.
        rtol, atol: tolerances of the adaptive solvers, whose steps meet them on average over the whole batch: a row's
            result depends, within them, on the rows beside it. ``BY_ROW`` in ``solvers/table.py`` has the solvers whose
            rows step on their own.
        callback: called after each step with (step index, t reached, x); a tensor that it returns replaces x.
        progress: True for a progress bar, or a function that wraps the iterable of step indices (``tqdm`` or like
            it). A bar shows the evaluations done so far (NFE); to have their number, pass ``Counted(velocity)``.
        generator: for solvers that draw noise; a list with one for each row makes every row independent of the others.

    Returns:
        x at times[-1], in the dtype of x. Differentiable.

    Raises:
        UserError: unknown solver (the nearest is suggested); values not finite (step and t are named); invalid times or
            shapes.
    """
    method = find_solver(solver)
    grid = checked_times(times)
    if not x.is_floating_point():
        raise UserError(f"x has dtype {x.dtype}", "Pass a floating-point tensor.")
    require_finite(x, f"the starting x at t = {grid[0]:g}", "Check where it comes from.")
    dtype, state = x.dtype, x.to(compute_dtype(x))
    given = None if score is None else with_time_rows(score)
    own_score = None if given is None else lambda y, t: given(y.to(dtype), t)
    options = SolverOptions(path=path or CondOT(), score=own_score, rtol=rtol, atol=atol, generator=generator)
    step = method.start(options)

    counted = Counted(velocity)
    steps = progress_over(progress, range(len(grid) - 1))
    show = getattr(steps, "set_postfix", None)
    for index in steps:
        t, t_next = grid[index], grid[index + 1]
        field = _checked_field(counted, dtype, f"in step {index + 1} of {len(grid) - 1}")
        field = _within_step(field, t, t_next, fixed=method.evaluations is not None)
        try:
            state = step(field, state, t, t_next)
        except UndeterminedError:
            state = dpm_solver_2m(options)(field, state, t, t_next)  # its first step: DDIM
        if show is not None:
            show(evaluations=counted.evaluations, refresh=False)
        if callback is not None:
            replacement = callback(index, _scalar(grid[index + 1], state), state.to(dtype))
            if replacement is not None:
                _require_shape(replacement, state, "the callback")
                require_finite(replacement, f"the callback's x after step {index + 1}", "Check the callback.")
                state = replacement.to(state)
    require_finite(state, f"x at t = {grid[-1]:g}", "Take smaller steps, or another solver ('heun').")
    return state.to(dtype)


def find_solver(solver: str | Solver, why_deterministic: str = "") -> Solver:
    """Return the entry of ``SOLVERS``, or ``solver`` itself where it is none.

    Args:
        why_deterministic: if given, what a stochastic solver cannot do here: it is refused.

    Raises:
        UserError: it is unknown (the nearest is suggested), or stochastic.
    """
    method = solver if isinstance(solver, Solver) else lookup(SOLVERS, solver, "solver")
    if why_deterministic and method.stochastic:
        named = f"solver '{solver}'" if isinstance(solver, str) else "the solver"
        raise UserError(f"{named} is stochastic: {why_deterministic}", "Use 'heun', 'rk4' or 'dopri5'.")
    return method


def _checked_field(velocity: Velocity, dtype: torch.dtype, where: str) -> Field:
    """``velocity`` called in the network's ``dtype``, its result checked and in the state's precision."""

    def field(x: Tensor, t: float | Tensor) -> Tensor:
        value = velocity(x.to(dtype), t if isinstance(t, Tensor) else _scalar(t, x))
        _require_shape(value, x, "the velocity")
        require_finite(
            value,
            f"the velocity at t = {_times_text(t)} {where}",
            NOT_FINITE,
        )
        return value.to(x.dtype)

    return field


#: Farthest from an end where the velocity is not determined that it is taken in its place.
_REACH = 0.05


def _within_step(evaluate: Callable[[Tensor, Any], Tensor], t: float, t_next: float, *, fixed: bool) -> Field:
    """Return the field of one step, which raises `UndeterminedError` where it is determined at t and not at t_next.

    Where it is not at t = 0 or 1, it is that of a little later: nearer, the errors of the prediction would be magnified
    more than the step shrinks them. (Not for solvers that choose their own steps, to which it would be a jump.)
    """
    later = t + math.copysign(min(abs(t_next - t), _REACH), t_next - t)
    instead = later if fixed and t in (0.0, 1.0) else t
    known: tuple[Tensor, Tensor] | None = None  # at t; DDIM asks again
    determined = True  # at t

    def field(x: Tensor, time: float | Tensor) -> Tensor:
        nonlocal known, determined
        if determined and bool(torch.as_tensor(time == t_next).any()):
            with undetermined_refused():
                return evaluate(x, time)
        if isinstance(time, Tensor) or time != t:
            return evaluate(x, time)
        if known is None or known[0] is not x:
            try:
                with undetermined_refused():
                    known = x, evaluate(x, t)
            except UndeterminedError:
                known, determined = (x, evaluate(x, instead)), False
        return known[1]

    return field


def _require_shape(value: Tensor, like: Tensor, what: str) -> None:
    if value.shape != like.shape:
        raise UserError(
            f"{what} returned shape {tuple(value.shape)}, but must keep the shape of x, {tuple(like.shape)}"
        )


def _times_text(t: float | Tensor) -> str:
    if not isinstance(t, Tensor):
        return f"{t:g}"
    low, high = float(t.min()), float(t.max())
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _scalar(t: float, x: Tensor) -> Tensor:
    # Filled on the device: a copy to it would wait for all the work queued there.
    return torch.full((), t, dtype=x.dtype, device=x.device)


def progress_over(progress: Progress, steps: Iterable[int]) -> Iterable[int]:
    """Return ``steps`` under a progress bar, or wrapped by ``progress`` if that is a function."""
    if callable(progress):
        return progress(steps)
    if not progress:
        return steps
    from ...utils.progress import progress_bar

    bar: Iterable[int] = progress_bar(steps, desc="sampling", unit="step")
    return bar
