"""Guidance: velocities in, a guided velocity out. The order is always: conditional, then unconditional.

Two forms of one rule. ``guide`` takes two velocities and evaluates them one after the other.
``guide_batched`` takes one velocity over a doubled batch, faster on an accelerator; it doubles x (and
t) and splits the result itself, so the order is decided here alone: first conditional, then unconditional::

    both = Condition.cat(cond, cond.unconditional())
    velocity = guide_batched(lambda x, t: model(x, t, both), lambda x, t: model(x, t, cond), scale=4.0)

With c and u the two velocities and w the scale, row by row, the rule is

    v = c + (w - 1) (c - s u),           s = 1, or <c, u> / |u|^2 with ``optimized_scale``
    v <- v (1 - r + r std(c) / std(v)),  r = ``rescale``
    v = 0                                while t < ``zero_init``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError
from .tensors import Velocity, compute_dtype, expand_t, per_row, with_time_rows


def guide(
    conditional: Velocity,
    unconditional: Velocity,
    scale: float | Tensor,
    interval: tuple[float, float] = (0.0, 1.0),
    *,
    rescale: float = 0.0,
    optimized_scale: bool = False,
    zero_init: float = 0.0,
    adjust: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Velocity:
    """Classifier-free guidance, v = v_uncond + scale (v_cond - v_uncond), on all channels.

    Ho & Salimans 2022 (arXiv:2207.12598), eq. 6 with scale = 1 + w; limited to an interval of t as in
    Kynkaanniemi et al. 2024 (arXiv:2404.07724). A weaker model in the place of ``unconditional`` (smaller, less
    trained, under the same condition) is autoguidance, Karras et al. 2024 (arXiv:2406.02507).

    Args:
        conditional, unconditional: velocities (x, t) -> dx/dt.
        scale: 1 is the plain conditional velocity at one evaluation; more follows the condition harder. One
            number, or (B,): one for each row.
        interval: (low, high) in t (t = 0 noise, t = 1 data): guide where low <= t <= high; elsewhere only
            ``conditional`` is evaluated.
        rescale: in [0, 1]: how far to bring the standard deviation of each guided row back to that of its
            conditional velocity, against overexposure. Lin et al. 2023 (arXiv:2305.08891), eq. 15-16; 0.7 there.
        optimized_scale: in the place of the unconditional velocity, the multiple of it that is nearest to the
            conditional one: half of CFG-Zero*, Fan et al. 2025 (arXiv:2503.18886).
        zero_init: the velocity is 0 while t < zero_init, whatever the scale, without an evaluation: the other half
            of CFG-Zero*; 0.04 is one step of 25. For deterministic solvers: no score follows from it.
        adjust: (guided, conditional) -> guided velocity, for rules that pretrained models have beside this one.

    Raises:
        UserError: scale is not finite; the interval is not 0 <= low <= high <= 1; rescale is outside [0, 1] or
            zero_init outside [0, 1).
        ValueError: scale has more than one dimension or, when evaluated, not one number for each row.
    """
    conditional, unconditional = with_time_rows(conditional), with_time_rows(unconditional)

    def pair(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return conditional(x, t), unconditional(x, t)

    return _guided(conditional, pair, scale, interval, rescale, optimized_scale, zero_init, adjust)


def guide_batched(
    batched: Velocity,
    conditional: Velocity,
    scale: float | Tensor,
    interval: tuple[float, float] = (0.0, 1.0),
    *,
    rescale: float = 0.0,
    optimized_scale: bool = False,
    zero_init: float = 0.0,
    adjust: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Velocity:
    """``guide`` with one evaluation per guided call instead of two.

    Args:
        batched: velocity over 2B rows: the first B rows under the condition, the last B without it. It is
            called with x twice over, and a (B,) t twice over; a scalar t is passed as it is.
        conditional: velocity over B rows, evaluated alone at scale 1 or outside the interval.
        scale, interval, rescale, optimized_scale, zero_init, adjust: as in ``guide``.

    Raises:
        UserError, ValueError: as in ``guide``.
    """
    rules = rescale, optimized_scale, zero_init, adjust
    return _guided(with_time_rows(conditional), halves(batched), scale, interval, *rules)


def halves(batched: Velocity) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """Return (x, t) -> the two halves of what ``batched`` makes of x twice over; see ``guide_batched``."""
    both = with_time_rows(batched)
    return lambda x, t: both(torch.cat([x, x]), torch.cat([t, t]) if t.ndim else t).chunk(2)


def _guided(
    conditional: Velocity,
    pair: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    scale: float | Tensor,
    interval: tuple[float, float],
    rescale: float,
    optimized_scale: bool,
    zero_init: float,
    adjust: Callable[[Tensor, Tensor], Tensor] | None,
) -> Velocity:
    scales, (low, high) = checked_scales(scale, interval), interval
    if not 0.0 <= rescale <= 1.0:
        raise UserError(f"guidance rescale {rescale}", "Use a number in [0, 1]; 0 is off, 0.7 is usual.")
    if not 0.0 <= zero_init < 1.0:
        raise UserError(f"guidance zero_init {zero_init}", "Use a time in [0, 1); 0 is off, 0.04 is usual.")

    def guided(x: Tensor, t: Tensor) -> Tensor:
        check_rows(scales, x)
        time, w = expand_t(t, x), per_row(scales, x)
        active = (low <= time) & (time <= high) & (w != 1.0).to(time.device)  # () or (B, 1, ..., 1)
        if not bool(active.any()):
            return conditional(x, t)
        given = pair(x, t)
        c, u = (velocity.to(compute_dtype(velocity)) for velocity in given)
        if optimized_scale:
            u = _dot(c, u) / _dot(u, u).clamp_min(torch.finfo(u.dtype).tiny) * u
        v = c + (w - 1.0).to(c) * (c - u)
        if rescale:
            v = v * (1.0 - rescale + rescale * _ratio_of_stds(c, v))
        if adjust is not None:
            v = adjust(v, c)
        return torch.where(active.to(c.device), v, c).to(given[0].dtype)  # elsewhere exactly the conditional

    velocity = conditional if bool((scales == 1.0).all()) else guided
    return _zero_until(velocity, zero_init) if zero_init else velocity


def checked_scales(scale: float | Tensor, interval: tuple[float, float]) -> Tensor:
    """Return the guidance scale, () or (B,), in float64 on the CPU.

    Raises:
        UserError: scale is not finite; the interval is not 0 <= low <= high <= 1.
        ValueError: scale has more than one dimension.
    """
    low, high = interval
    if not 0.0 <= low <= high <= 1.0:
        raise UserError(f"guidance interval ({low}, {high})", "Use 0 <= low <= high <= 1 (t = 1 is data).")
    scales = torch.as_tensor(scale, dtype=torch.float64, device="cpu")
    if scales.ndim > 1:
        raise ValueError(
            f"scale has shape {tuple(scales.shape)}: pass one number, or one per row, shape (B,)"
        )
    if not bool(scales.isfinite().all()):
        raise UserError(
            f"guidance scale {scales.tolist()}", "Use finite numbers; 1 is off, 2 to 7 are usual."
        )
    return scales


def check_rows(scales: Tensor, x: Tensor) -> None:
    """Raise ValueError where ``scales`` are neither one number nor one for each row of x."""
    if scales.ndim and scales.shape != x.shape[:1]:
        raise ValueError(
            f"scale has shape {tuple(scales.shape)} for {len(x)} rows: pass one number, or one per row"
        )


def _zero_until(velocity: Velocity, start: float) -> Velocity:
    def stilled(x: Tensor, t: Tensor) -> Tensor:
        still = expand_t(t, x) < start
        if bool(still.all()):
            return 0.0 * x  # rather than zeros, so that its divergence can be taken
        return velocity(x, t).masked_fill(still.to(x.device), 0.0)

    return stilled


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each row: (B, ...) -> (B, 1, ..., 1)."""
    return per_row((a * b).reshape(len(a), -1).sum(1), a)


def _ratio_of_stds(c: Tensor, v: Tensor) -> Tensor:
    """std(c) / std(v) of each row, (B, 1, ..., 1); 1 where a row does not vary (a single element, say)."""
    stds = [velocity.reshape(len(velocity), -1).std(1, correction=0) for velocity in (c, v)]
    return per_row(torch.where(stds[1] > 0, stds[0] / stds[1], 1.0), c)
