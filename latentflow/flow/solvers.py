"""Solvers: one step from t to t_next, and the one loop ``integrate`` that takes the steps.

A new Runge-Kutta method is one tableau in ``SOLVERS``. Any other method is one function
``start(options) -> step``, called once per integration: what it closes over is its memory (a multistep
history, a generator for noise).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from latentflow.errors import UserError, lookup

from .tensors import Velocity, compute_dtype

#: The velocity as a solver sees it: (x, t as a Python float) -> dx/dt; checked, in x's own precision.
Field: TypeAlias = Callable[[Tensor, float], Tensor]
#: (field, x, t, t_next) -> x at t_next. Evaluates the field only between t and t_next.
Step: TypeAlias = Callable[[Field, Tensor, float, float], Tensor]


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """What a solver may need beyond the velocity."""

    rtol: float
    atol: float
    generator: torch.Generator | None


@dataclass(frozen=True, kw_only=True)
class Solver:
    """An entry of ``SOLVERS``.

    Attributes:
        order: global order of convergence; a test holds every entry to it.
        evaluations: velocity evaluations per step; None where the solver decides.
        start: makes the step function of one integration.
    """

    order: int
    evaluations: int | None
    start: Callable[[SolverOptions], Step]


def runge_kutta(
    order: int, nodes: Sequence[float], matrix: Sequence[Sequence[float]], weights: Sequence[float]
) -> Solver:
    """A Butcher tableau as a step: x + h sum_i b_i k_i with k_i = f(x + h sum_j a_ij k_j, t + c_i h)."""

    def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
        h = t_next - t
        slopes: list[Tensor] = []
        for node, row in zip(nodes, matrix, strict=True):
            # In this form nodes 0 and 1 are t and t_next exactly: rounding never steps out of [0, 1].
            slopes.append(field(_combine(x, h, row, slopes), (1.0 - node) * t + node * t_next))
        return _combine(x, h, weights, slopes)

    return Solver(order=order, evaluations=len(nodes), start=lambda options: step)


def _combine(x: Tensor, h: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = x + (h * weight) * slope
    return x


def _dormand_prince(options: SolverOptions) -> Step:
    """Dormand & Prince 1980, by torchdiffeq: as many inner steps as the tolerances ask for.

    It lands on t_next and evaluates nothing beyond. The error is the root mean square over the whole batch,
    so a row's result may depend, within the tolerance, on the rows beside it.
    """
    from torchdiffeq import odeint  # imported here: it brings scipy with it

    first_step = 0.05  # torchdiffeq's own first guess would evaluate beyond the interval

    def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
        nonlocal first_step
        accepted: list[float] = []
        span, sign, (low, high) = abs(t_next - t), (1.0 if t_next > t else -1.0), sorted((t, t_next))

        def rightwards(s: Tensor, y: Tensor) -> Tensor:  # s runs from 0 to span, whichever way t runs
            return sign * field(y, min(max(t + sign * float(s), low), high))

        setattr(rightwards, "callback_accept_step", lambda s, y, ds: accepted.append(float(ds)))  # noqa: B010
        ends = torch.tensor([0.0, span], dtype=_time_dtype(x.device), device=x.device)
        # step_t clips the last step to the end, where the default oversteps it and interpolates back.
        inner = {"first_step": min(first_step, span), "step_t": ends[1:], "dtype": ends.dtype}
        try:
            x = odeint(
                rightwards, x, ends, rtol=options.rtol, atol=options.atol, method="dopri5", options=inner
            )[-1]
        except AssertionError as error:  # torchdiffeq's way to say that the step size underflowed
            if "underflow in dt" not in str(error):
                raise
            raise UserError(
                f"dopri5 cannot meet rtol {options.rtol:g} and atol {options.atol:g} on [{t:g}, {t_next:g}]",
                "Use larger tolerances, float32 in place of half precision, or a fixed-step solver ('heun').",
            ) from error
        first_step = max(accepted)
        return x

    return step


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
    "dopri5": Solver(order=5, evaluations=None, start=_dormand_prince),
}


def integrate(
    velocity: Velocity,
    x: Tensor,
    times: Tensor | Sequence[float],
    solver: str = "heun",
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    callback: Callable[[int, Tensor, Tensor], Tensor | None] | None = None,
    progress: bool | Callable[[Iterable[int]], Iterable[int]] = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Follow dx/dt = velocity(x, t) from ``times[0]`` to ``times[-1]``.

    Args:
        velocity: (x, t) -> dx/dt. It gets x in the given dtype and t as a scalar float64 tensor, and is
            evaluated only within [times[0], times[-1]].
        x: (B, ...) at times[0], floating point. Half precision is summed up in float32 between evaluations.
        times: N + 1 times make N steps; strictly increasing (noise to data) or decreasing (data to noise), in
            [0, 1]. An adaptive solver lands on each of them, so [0, 1] is its cheapest grid.
        solver: a key of ``SOLVERS``.
        rtol, atol: tolerances of the adaptive solvers.
        callback: called after each step with (step index, t reached, x); a tensor that it returns replaces x.
        progress: True for a progress bar, or a function that wraps the iterable of step indices.
        generator: for solvers that draw noise.

    Returns:
        x at times[-1], in the dtype of x. Differentiable.

    Raises:
        UserError: unknown solver (the nearest is suggested); values not finite (step and t are named).
        ValueError: times or shapes that make no sense.
    """
    step = lookup(SOLVERS, solver, "solver").start(SolverOptions(rtol=rtol, atol=atol, generator=generator))
    grid = _checked_times(times)
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: pass a floating-point tensor")
    _require_finite(x, f"the starting x at t = {grid[0]:g}", "Check where it comes from.")
    dtype, state = x.dtype, x.to(compute_dtype(x))

    for index in _progress(progress, range(len(grid) - 1)):
        field = _checked_field(velocity, dtype, f"in step {index + 1} of {len(grid) - 1}")
        state = step(field, state, grid[index], grid[index + 1])
        if callback is not None:
            replacement = callback(index, _scalar(grid[index + 1], x.device), state.to(dtype))
            if replacement is not None:
                _require_shape(replacement, state, "the callback")
                _require_finite(
                    replacement, f"the callback's x after step {index + 1}", "Check the callback."
                )
                state = replacement.to(state)
    return state.to(dtype)


def _checked_times(times: Tensor | Sequence[float]) -> list[float]:
    grid = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(
            f"times has shape {tuple(grid.shape)}: pass N + 1 times for N >= 1 steps, e.g. time_grid(20)"
        )
    if not bool(((grid >= 0) & (grid <= 1)).all()):
        raise ValueError(f"times must lie in [0, 1] (t = 0 is noise, t = 1 is data), but are {_brief(grid)}")
    gaps = grid.diff()
    if not (bool((gaps > 0).all()) or bool((gaps < 0).all())):
        raise ValueError(
            f"times must strictly increase or strictly decrease, but are {_brief(grid)}: sort, remove repeats"
        )
    values: list[float] = grid.tolist()
    return values


def _brief(grid: Tensor) -> str:
    values = [f"{value:g}" for value in grid.tolist()]
    return "[" + ", ".join(values if len(values) <= 12 else [*values[:6], "...", *values[-5:]]) + "]"


def _checked_field(velocity: Velocity, dtype: torch.dtype, where: str) -> Field:
    """``velocity`` called in the network's ``dtype``, its result checked and in the state's precision."""

    def field(x: Tensor, t: float) -> Tensor:
        value = velocity(x.to(dtype), _scalar(t, x.device))
        _require_shape(value, x, "the velocity")
        _require_finite(
            value,
            f"the velocity at t = {t:g} {where}",
            "If the network runs in float16, use bfloat16 or float32; otherwise look at its training log.",
        )
        return value.to(x.dtype)

    return field


def _require_shape(value: Tensor, like: Tensor, what: str) -> None:
    if value.shape != like.shape:
        raise ValueError(
            f"{what} returned shape {tuple(value.shape)}, but must keep the shape of x, {tuple(like.shape)}"
        )


def _require_finite(value: Tensor, what: str, fix: str) -> None:
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise UserError(f"{what} is not finite: {bad} of {value.numel()} values are NaN or infinite", fix)


def _time_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _scalar(t: float, device: torch.device) -> Tensor:
    return torch.tensor(t, dtype=_time_dtype(device), device=device)


def _progress(
    progress: bool | Callable[[Iterable[int]], Iterable[int]], steps: Iterable[int]
) -> Iterable[int]:
    if callable(progress):
        return progress(steps)
    if not progress:
        return steps
    from tqdm.auto import tqdm

    bar: Any = tqdm(steps)
    return bar  # type: ignore[no-any-return]
