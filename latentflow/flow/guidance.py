"""Guidance: velocities in, a guided velocity out. The order is always: conditional, then unconditional.

Two forms of one rule. ``guide`` takes two velocities and evaluates them one after the other.
``guide_batched`` takes one velocity over a doubled batch, faster on an accelerator; it doubles x (and
t) and splits the result itself, so the order is decided here alone: first conditional, then unconditional::

    both = Condition.cat(cond, cond.unconditional())
    velocity = guide_batched(lambda x, t: model(x, t, both), lambda x, t: model(x, t, cond), scale=4.0)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentflow.errors import UserError

from .tensors import Velocity, compute_dtype, expand_t


def guide(
    conditional: Velocity, unconditional: Velocity, scale: float, interval: tuple[float, float] = (0.0, 1.0)
) -> Velocity:
    """Classifier-free guidance, v = v_uncond + scale (v_cond - v_uncond).

    Ho & Salimans 2022 (arXiv:2207.12598), eq. 6 with scale = 1 + w; limited to an interval of t as in
    Kynkaanniemi et al. 2024 (arXiv:2404.07724). A weaker model in the place of ``unconditional`` is
    autoguidance (arXiv:2406.02507).

    Args:
        conditional, unconditional: velocities (x, t) -> dx/dt.
        scale: 1 is the plain conditional velocity at one evaluation; more follows the condition harder.
        interval: (low, high) in t (t = 0 noise, t = 1 data): guide where low <= t <= high; elsewhere only
            ``conditional`` is evaluated.

    Raises:
        UserError: scale is not finite, or the interval is not 0 <= low <= high <= 1.
    """
    return _guided(conditional, lambda x, t: (conditional(x, t), unconditional(x, t)), scale, interval)


def guide_batched(
    batched: Velocity, conditional: Velocity, scale: float, interval: tuple[float, float] = (0.0, 1.0)
) -> Velocity:
    """``guide`` with one evaluation per guided call instead of two.

    Args:
        batched: velocity over 2B rows: the first B rows under the condition, the last B without it. It is
            called with x twice over, and a (B,) t twice over; a scalar t is passed as it is.
        conditional: velocity over B rows, evaluated alone at scale 1 or outside the interval.
        scale, interval: as in ``guide``.

    Raises:
        UserError: as in ``guide``.
    """

    def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with_condition, without = batched(torch.cat([x, x]), torch.cat([t, t]) if t.ndim else t).chunk(2)
        return with_condition, without

    return _guided(conditional, pair, scale, interval)


def _guided(
    conditional: Velocity,
    pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    scale: float,
    interval: tuple[float, float],
) -> Velocity:
    low, high = interval
    if not abs(scale) < float("inf"):
        raise UserError(f"guidance scale {scale}", "Use a finite number; 1 is off, 2 to 7 are usual.")
    if not 0.0 <= low <= high <= 1.0:
        raise UserError(f"guidance interval ({low}, {high})", "Use 0 <= low <= high <= 1 (t = 1 is data).")
    if scale == 1.0:
        return conditional

    def guided(x: Tensor, t: Tensor) -> Tensor:
        inside = (low <= t) & (t <= high)  # () or (B,)
        if not bool(inside.any()):
            return conditional(x, t)
        with_condition, without = pair(x, t)
        precision = compute_dtype(with_condition)
        extra = (scale - 1.0) * (with_condition.to(precision) - without.to(precision))
        # v_cond + (scale - 1)(v_cond - v_uncond), so that rows outside the interval equal v_cond exactly.
        extra = extra * expand_t(inside, x).to(extra)
        return (with_condition.to(precision) + extra).to(with_condition.dtype)

    return guided
