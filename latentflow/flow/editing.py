"""Editing with two velocities, one that describes an image as it is and one that describes it as it should be.

Both belong to the straight path, x_t = t x1 + (1 - t) x0. ``times`` start at 1 - strength: the earlier, the further
from the image the edit may lead. Where both are the exact velocities of Gaussians that differ in their mean alone,
N(m, c^2) and N(m', c^2), every method, averaged or not, moves x1 by (m' - m) (1 - s c / sqrt(s^2 c^2 + (1 - s)^2)) with
s = times[0]: not at all at s = 1, all the way at s = 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError
from .solvers import Callback, Progress, Solver, Times, find_solver, integrate
from .tensors import Generators, Velocity, compute_dtype, expand_t, normal_like, with_time_rows
from .times import checked_times


def flow_edit(
    source_velocity: Velocity,
    target_velocity: Velocity,
    x1: Tensor,
    times: Times,
    solver: str | Solver = "euler",
    *,
    draws: int = 1,
    plain_from: float = 1.0,
    generator: Generators = None,
    mask: Tensor | None = None,
    callback: Callback | None = None,
    progress: Progress = False,
) -> Tensor:
    """FlowEdit: from image to image without noise in between, Kulikov et al. 2024 (arXiv:2412.08629), alg. 1.

    z starts as x1 and follows dz/dt = E[v_target(z + x_t - x1, t) - v_source(x_t, t)] over x_t = t x1 + (1 - t) x0
    with noise x0 that is drawn anew at every step, and is the same on both sides of the difference.

    Args:
        source_velocity, target_velocity: (x, t) -> dx/dt, perhaps guided; a step evaluates each ``draws`` times.
        x1: (B, ...), the data to edit.
        times: strictly increasing, from 1 - n_max / T of the paper to 1.
        solver: a key of ``SOLVERS`` or a ``Solver``, deterministic. All evaluations of a step see the same noise.
        draws: noises over which each step averages, n_avg of the paper.
        plain_from: steps that begin at this t or later sample z + x_t - x1 under the target alone, so that details
            need not follow the source: 1 - n_min / T of the paper. 1: no such steps.
        generator: for the noise; a list with one for each row makes every row independent of the others.
        mask: broadcast to x1: data is edited where it is above 0, and kept elsewhere. None: edited everywhere.
        callback, progress: as in ``integrate``; x is z, and in the plain part the noisy sample.

    Returns:
        The edited data, in the shape and dtype of x1.

    Raises:
        UserError: the solver is stochastic or unknown; draws < 1; plain_from outside [0, 1]; times that do not
            increase; and as in ``integrate``.
    """
    method = deterministic(solver)
    if draws < 1:
        raise UserError(f"draws is {draws}", "Use 1 or more; 1 is usual.")
    if not 0.0 <= plain_from <= 1.0:
        raise UserError(f"plain_from is {plain_from}", "Use a time in [0, 1]; 1 is off.")
    source_velocity, target_velocity = with_time_rows(source_velocity), with_time_rows(target_velocity)
    data = x1.to(compute_dtype(x1))
    grid = _rising(times)
    edited = int((grid[:-1] < plain_from).sum())  # steps before the plain part
    noises = [normal_like(data, generator) for _ in range(draws)]

    def difference(z: Tensor, t: Tensor) -> Tensor:
        share, total = expand_t(t, data), torch.zeros_like(data)
        for noise in noises:
            x = share * data + (1.0 - share) * noise
            target = target_velocity((z + x - data).to(z.dtype), t)
            total += target.to(total) - source_velocity(x.to(z.dtype), t).to(total)
        return (total / draws).to(z.dtype)

    moved = difference if mask is None else _within(mask, difference, torch.zeros_like(x1))

    def after(index: int, t: Tensor, z: Tensor) -> Tensor | None:
        noises[:] = [normal_like(data, generator) for _ in range(draws)]
        return None if callback is None else callback(index, t, z)

    z = x1
    if edited:
        z = integrate(moved, z, grid[: edited + 1], method, callback=after, progress=progress)
    if edited == len(grid) - 1:
        return z
    start = grid[edited].to(data)
    x = (z + (1.0 - start) * (noises[0] - data)).to(x1.dtype)  # z + x_t - x1
    later = callback and _counting_from(edited, callback)
    if mask is not None:  # elsewhere the sample goes straight to the data
        target_velocity = _within(mask, target_velocity, (data - noises[0]).to(x1.dtype))
    x = integrate(target_velocity, x, grid[edited:], method, callback=later, progress=progress)
    return x if mask is None else torch.where(mask > 0, x, x1)


def inversion_edit(
    source_velocity: Velocity,
    target_velocity: Velocity,
    x1: Tensor,
    times: Times,
    solver: str | Solver = "heun",
    *,
    mask: Tensor | None = None,
    callback: Callback | None = None,
    progress: Progress = False,
) -> Tensor:
    """Follow the flow of the source back, then that of the target forth: DDIM inversion, for flows.

    Song et al. 2020 (arXiv:2010.02502), sec. 5.4; with a start short of pure noise as in SDEdit, Meng et al. 2021
    (arXiv:2108.01073), but with the noise that the image has, in place of a random one. With equal velocities it is
    the round trip, and gives x1 back up to the solver's error. With a mask what is kept returns the way that it came,
    as in DiffEdit, Couairon et al. 2022 (arXiv:2210.11427).

    Args:
        source_velocity, target_velocity: (x, t) -> dx/dt, perhaps guided. Guidance far above 1 magnifies the solver's
            error on the way back.
        x1: (B, ...), the data to edit.
        times: strictly increasing, from 1 - strength to 1; gone over twice.
        solver: a key of ``SOLVERS`` or a ``Solver``, deterministic.
        mask: broadcast to x1: data is edited where it is above 0, and kept elsewhere. None: edited everywhere.
        callback, progress: as in ``integrate``; N steps make 2 N calls, the first N of them on the way back.

    Returns:
        The edited data, in the shape and dtype of x1.

    Raises:
        UserError: the solver is stochastic or unknown; times that do not increase; and as in ``integrate``.
    """
    method = deterministic(solver)
    grid = _rising(times)
    back, later = callback, callback and _counting_from(len(grid) - 1, callback)
    if mask is not None:
        back, later = _returning(mask, x1, back, later)
    x = integrate(source_velocity, x1, grid.flip(0), method, callback=back, progress=progress)
    return integrate(target_velocity, x, grid, method, callback=later, progress=progress)


def direct_edit(
    source_velocity: Velocity,
    target_velocity: Velocity,
    x1: Tensor,
    times: Times,
    solver: str | Solver = "euler",
    *,
    mask: Tensor | None = None,
    callback: Callback | None = None,
    progress: Progress = False,
) -> Tensor:
    """DirectEdit: an inversion whose errors are recorded and given back (arXiv:2605.02417).

    The source's flow leads back over states x_k. A step forth from x_(k-1) misses x_k by a residual, which is added
    after the target's step too. With equal velocities x1 comes back up to rounding, whatever the number of steps.

    Args:
        source_velocity, target_velocity: (x, t) -> dx/dt, perhaps guided. Euler's method evaluates the source once
            more than for `inversion_edit`, and no more: the evaluations of the way back serve again.
        x1: (B, ...), the data to edit.
        times: strictly increasing, from 1 - strength to 1; gone over twice.
        solver: a key of ``SOLVERS`` or a ``Solver``, deterministic.
        mask, callback, progress: as in `inversion_edit`.

    Returns:
        The edited data, in the shape and dtype of x1.

    Raises:
        UserError: as `inversion_edit`.
    """
    method, grid = deterministic(solver), _rising(times)
    source, states, residuals = _Remembered(source_velocity), [x1], list[Tensor]()

    def record(index: int, t: Tensor, x: Tensor) -> Tensor:
        states.append(_seen(callback, index, t, x))
        return states[-1]

    def miss(index: int, t: Tensor, x: Tensor) -> Tensor:
        residuals.append(states[index + 1] - x)
        return states[index + 1]

    def give_back(index: int, t: Tensor, x: Tensor) -> Tensor:
        x = x + residuals[index]
        if mask is not None:
            x = torch.where(mask > 0, x, states[index + 1].to(x.dtype))
        return _seen(callback, len(residuals) + index, t, x)

    integrate(source, x1, grid.flip(0), method, callback=record, progress=progress)
    states.reverse()
    integrate(source, states[0], grid, method, callback=miss)
    return integrate(target_velocity, states[0], grid, method, callback=give_back, progress=progress)


class _Remembered:
    """A velocity that does not evaluate again what it was asked last time at a time."""

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = with_time_rows(velocity)
        self.known: dict[tuple[float, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        time = tuple(t.reshape(-1).tolist())
        before, value = self.known.get(time, (None, None))
        if before is None or value is None or not torch.equal(before, x):
            value = self.velocity(x, t)
            self.known[time] = x, value
        return value


#: name -> ``method(source_velocity, target_velocity, x1, times, solver, *, mask, callback, progress,
#: <its own settings>)``
EDITING: dict[str, Callable[..., Tensor]] = {
    "flowedit": flow_edit,
    "inversion": inversion_edit,
    "direct": direct_edit,
}


def slerp(a: Tensor, b: Tensor, share: float | Tensor) -> Tensor:
    """Interpolate row by row from ``a`` (share 0) to ``b`` (share 1) along the arc between them: Shoemake 1985.

    Noise in many dimensions lies near a sphere, and so does what is in between, which a straight line would leave.
    Rows that are (nearly) parallel or opposite, where the arc is not unique, take the straight line.

    Args:
        a, b: (B, ...).
        share: in [0, 1]: one number, or (B,).

    Returns:
        (B, ...) in the dtype of a and b; exactly a at 0 and b at 1; where both have the same norm, so has the result.

    Raises:
        ValueError: shapes that differ, or a share outside [0, 1].
    """
    if a.shape != b.shape:
        raise ValueError(f"a has shape {tuple(a.shape)} but b has {tuple(b.shape)}: pass equal shapes")
    dtype = compute_dtype(a, b)
    s = torch.as_tensor(share, dtype=dtype, device=a.device)
    if s.shape not in ((), a.shape[:1]):
        raise ValueError(f"share has shape {tuple(s.shape)} for {len(a)} rows: pass one, or one per row")
    if not bool(((s >= 0) & (s <= 1)).all()):
        raise ValueError(f"share must lie in [0, 1] (0 is a, 1 is b), but spans [{s.min():g}, {s.max():g}]")
    s, rows = s.expand(len(a))[:, None], [x.to(dtype).flatten(1) for x in (a, b)]
    units = [x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(dtype).tiny) for x in rows]
    chord, sum_ = (x.norm(dim=1, keepdim=True) for x in (units[0] - units[1], units[0] + units[1]))
    angle = 2.0 * torch.atan2(chord, sum_)  # accurate at every angle, unlike acos
    straight = torch.minimum(chord, sum_) < 1e-3
    sine = torch.where(straight, 1.0, angle.sin())
    weights = [torch.where(straight, x, (x * angle).sin() / sine) for x in (1.0 - s, s)]
    # A share of 1 has the weight sin(angle) / sin(angle) and 0: exact.
    return (weights[0] * rows[0] + weights[1] * rows[1]).reshape(a.shape).to(a.dtype)


def deterministic(solver: str | Solver) -> Solver:
    """Return the solver, if it is deterministic, so that a flow leads back to where it came from.

    Raises:
        UserError: it is stochastic or unknown.
    """
    return find_solver(solver, "it forgets the image")


def _rising(times: Times) -> Tensor:
    return torch.tensor(checked_times(times, rising=True), dtype=torch.float64)


def _counting_from(start: int, callback: Callback) -> Callback:
    return lambda index, t, x: callback(start + index, t, x)


def _within(mask: Tensor, velocity: Velocity, elsewhere: Tensor) -> Velocity:
    """Return a velocity where the mask is above 0, and ``elsewhere`` where it is not."""
    return lambda x, t: torch.where(mask > 0, velocity(x, t), elsewhere.to(x.dtype))


def _returning(
    mask: Tensor, x1: Tensor, back: Callback | None, forth: Callback | None
) -> tuple[Callback, Callback]:
    """Return callbacks of the way back and of the way forth, on which what the mask keeps is what it was on the way
    back at the same time."""
    passed = [x1]

    def going_back(index: int, t: Tensor, x: Tensor) -> Tensor:
        passed.append(_seen(back, index, t, x))
        return passed[-1]

    def going_forth(index: int, t: Tensor, x: Tensor) -> Tensor:
        return _seen(forth, index, t, torch.where(mask > 0, x, passed[-2 - index].to(x.dtype)))

    return going_back, going_forth


def _seen(callback: Callback | None, index: int, t: Tensor, x: Tensor) -> Tensor:
    """Return x, or what the callback puts in its place."""
    replacement = None if callback is None else callback(index, t, x)
    return x if replacement is None else replacement
