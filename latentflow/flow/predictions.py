"""Predictions of a network - velocity, data, noise, score - and their conversion into one another on any path.

Everything goes through the two ends of the path, x1 (data) and x0 (noise). With a = alpha and s = sigma,

    x_t = a x1 + s x0,  v = a' x1 + s' x0
    give  x1 = (s' x_t - s v) / D,  x0 = (a v - a' x_t) / D,  D = a s' - a' s,

without a division by a or s; D is -1 on the straight path. The score is -x0 / s, for x0 the posterior mean of
a standard normal source. Ma et al. 2024 (SiT, arXiv:2401.08740), sec. 2, has the velocity -> score formula.

The same two ends make ``as_velocity``, any prediction in any sampler, and ``change_path``, a network sampled on
a path that it was not trained on. a' and s' are those of ``Path.at``: finite, clipped where the path says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from ..errors import lookup
from .paths import Coefficients, Path
from .tensors import Velocity, compute_dtype, time_dtype, with_time_rows


def convert(value: Tensor, xt: Tensor, t: Tensor | float, path: Path, source: str, target: str) -> Tensor:
    """Convert ``value``, a prediction of kind ``source`` at (xt, t), to a prediction of kind ``target``.

    Args:
        value, xt: (B, ...) of equal shape.
        t: a scalar or (B,), in [0, 1].
        source, target: "velocity", "data", "noise" or "score". The score assumes a standard normal source.

    Returns:
        (B, ...) in the dtype of ``value``; half precision is calculated in float32.

    Raises:
        UserError: unknown kind (the nearest is suggested).
        ValueError: shapes differ; t has a wrong shape or range; or ``source`` does not determine ``target``
            at t (the score where sigma = 0, at t = 1; the data from the noise where alpha = 0, at t = 0).
    """
    noise, data = lookup(_NOISE, source, "prediction"), lookup(_DATA, source, "prediction")
    result = lookup(_RESULT, target, "prediction")
    if value.shape != xt.shape:
        raise ValueError(f"the prediction has shape {tuple(value.shape)} but xt has shape {tuple(xt.shape)}")
    dtype = compute_dtype(value, xt)
    known, x = value.to(dtype), xt.to(dtype)
    c = path.at(t, x)
    if source == target:
        return value
    try:
        return result(lambda: data(known, x, c), lambda: noise(known, x, c), c).to(value.dtype)
    except ZeroDivisionError as error:
        times = torch.as_tensor(t)
        raise ValueError(
            f"'{source}' does not determine '{target}' at t = {times.min().item():g} to {times.max().item():g} on "
            f"{path}: the conversion divides by {error}, which is 0 there. Keep t away from that end of the path, or "
            "convert from the velocity"
        ) from None


class UndeterminedError(Exception):
    """Signal of a velocity, before it evaluates its network, that the prediction does not determine it at this t."""


@contextmanager
def undetermined_refused() -> Iterator[None]:
    """Let the velocities of ``as_velocity`` raise `UndeterminedError` within, through all that wraps them."""
    token = _REFUSED.set(True)
    try:
        yield
    finally:
        _REFUSED.reset(token)


_REFUSED: ContextVar[bool] = ContextVar("undetermined velocities are refused", default=False)


def as_velocity(network: Velocity, path: Path, source: str) -> Velocity:
    """Return the velocity that ``network``, trained on ``path``, implies.

    Where its prediction does not determine the velocity (the data where sigma = 0, at t = 1; the noise and the
    score where alpha = 0, at t = 0), the network is evaluated at the nearest t at which the conversion magnifies its
    errors no more than 200 times: about t = 0.005 and 0.995 on the straight path. ``integrate`` steps into such an end
    and out of it without asking there. A velocity is returned as it is.

    Args:
        network: (x, t) -> a prediction of kind ``source``, shaped like x. t is given to it in float64.
        source: "velocity", "data", "noise" or "score".

    Returns:
        (x, t) -> velocity, in the dtype of x; half precision is calculated in float32.

    Raises:
        UserError: unknown kind (the nearest is suggested).
        ValueError: on a call, t has a wrong shape or range, or the prediction a wrong shape.
    """
    limits = torch.tensor(lookup(_DETERMINED, source, "prediction"), dtype=torch.float64)
    network = with_time_rows(network)
    if source == "velocity":
        return network
    first, last = path.inverse_log_snr(limits).tolist()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        wide, time = x.to(compute_dtype(x)), _as_time(t)
        if _REFUSED.get() and bool(((time < first) | (time > last)).any()):
            raise UndeterminedError
        c = path.at(time, wide)
        return _recombine(network, wide, path.clip(time).clamp(first, last), path, source, c, x.dtype)

    return velocity


def change_path(velocity: Velocity, old: Path, new: Path) -> Velocity:
    """Return ``velocity``, which belongs to the path ``old``, as a velocity on the path ``new``.

    Up to a scale, x_t is the same random variable on both paths wherever their log-SNR is the same. So the data
    and noise predictions are taken on the old path, at the matching t and at x times

        sqrt((a_old^2 + s_old^2) / (a_new^2 + s_new^2)),

    and put together with the new path's derivatives: no derivative of the change of time is needed. Exact where
    both paths reach the log-SNR; beyond the old path's range (a new path that starts with purer noise, or ends
    with cleaner data) the old path's nearest end is used. Finite on all of [0, 1]. Sample from ``new.start``.
    Karras et al. 2022 (EDM, arXiv:2206.00364), sec. 2 and 4; Pokle et al. 2023 (arXiv:2310.04432), sec. 3.

    Returns:
        (x, t) -> velocity, in the dtype of x; half precision is calculated in float32. ``velocity`` is given x
        in its dtype, and t in float64.

    Raises:
        ValueError: on a call, t has a wrong shape or range.
    """

    velocity = with_time_rows(velocity)

    def changed(x: Tensor, t: Tensor) -> Tensor:
        wide, time = x.to(compute_dtype(x)), _as_time(t)
        c = new.at(time, wide)
        old_time = old.clip(old.inverse_log_snr(new.log_snr(new.clip(time))))
        c_old = old.at(old_time, wide)
        scale = torch.hypot(c_old.alpha, c_old.sigma) / torch.hypot(c.alpha, c.sigma)
        return _recombine(velocity, scale * wide, old_time, old, "velocity", c, x.dtype)

    return changed


def _recombine(
    network: Velocity, x: Tensor, t: Tensor, path: Path, source: str, c: Coefficients, dtype: torch.dtype
) -> Tensor:
    """Return the velocity of the two ends that ``network`` implies at (x, t), moving with the derivatives in ``c``."""
    value = network(x.to(dtype), t).to(x.dtype)
    data = convert(value, x, t, path, source, "data")
    noise = convert(value, x, t, path, source, "noise")
    return (c.d_alpha * data + c.d_sigma * noise).to(dtype)


def _as_time(t: Tensor | float) -> Tensor:
    t = torch.as_tensor(t)
    return t.to(time_dtype(t.device))


def _divide(numerator: Tensor, denominator: Tensor, name: str) -> Tensor:
    if bool((denominator == 0).any()):
        raise ZeroDivisionError(name)
    return numerator / denominator


def _divide_by_determinant(numerator: Tensor, c: Coefficients) -> Tensor:
    return _divide(numerator, c.alpha * c.d_sigma - c.d_alpha * c.sigma, "alpha sigma' - alpha' sigma")


# prediction -> the noise x0 that it implies
_NOISE: dict[str, Callable[[Tensor, Tensor, Coefficients], Tensor]] = {
    "velocity": lambda v, x, c: _divide_by_determinant(c.alpha * v - c.d_alpha * x, c),
    "data": lambda x1, x, c: _divide(x - c.alpha * x1, c.sigma, "sigma"),
    "noise": lambda x0, x, c: x0,
    "score": lambda score, x, c: -c.sigma * score,
}

# prediction -> the data x1 that it implies
_DATA: dict[str, Callable[[Tensor, Tensor, Coefficients], Tensor]] = {
    "velocity": lambda v, x, c: _divide_by_determinant(c.d_sigma * x - c.sigma * v, c),
    "data": lambda x1, x, c: x1,
    "noise": lambda x0, x, c: _divide(x - c.sigma * x0, c.alpha, "alpha"),
    "score": lambda score, x, c: _divide(x + c.sigma**2 * score, c.alpha, "alpha"),
}

# (data, noise) -> prediction. Both are functions, so that an end that is not needed is not divided for.
_RESULT: dict[str, Callable[[Callable[[], Tensor], Callable[[], Tensor], Coefficients], Tensor]] = {
    "velocity": lambda data, noise, c: c.d_alpha * data() + c.d_sigma * noise(),
    "data": lambda data, noise, c: data(),
    "noise": lambda data, noise, c: noise(),
    "score": lambda data, noise, c: _divide(-noise(), c.sigma, "sigma"),
}

#: The kinds of prediction that ``convert`` knows.
PREDICTIONS: tuple[str, ...] = tuple(_RESULT)

# prediction -> the range of log-SNR in which converting it divides by no ratio of alpha to sigma below 1 / 200
_LIMIT = 2.0 * math.log(200.0)
_DETERMINED: dict[str, tuple[float, float]] = {
    "velocity": (-math.inf, math.inf),
    "data": (-math.inf, _LIMIT),
    "noise": (-_LIMIT, math.inf),
    "score": (-_LIMIT, math.inf),
}
