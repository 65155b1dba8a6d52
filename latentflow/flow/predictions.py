"""What a network may predict - velocity, data, noise, score - and how each turns into the others on any path.

Everything goes through the two ends of the path, x1 (data) and x0 (noise). With a = alpha and s = sigma,

    x_t = a x1 + s x0,  v = a' x1 + s' x0
    give  x1 = (s' x_t - s v) / D,  x0 = (a v - a' x_t) / D,  D = a s' - a' s,

without a division by a or s; D is -1 on the straight path. The score is -x0 / s, for x0 the posterior mean of
a standard normal source. Ma et al. 2024 (SiT, arXiv:2401.08740), sec. 2, has the velocity -> score formula.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from latentflow.errors import lookup

from .paths import Coefficients, Path
from .tensors import compute_dtype


def convert(value: Tensor, xt: Tensor, t: Tensor | float, path: Path, source: str, target: str) -> Tensor:
    """``value``, a prediction of kind ``source`` at (xt, t), as a prediction of kind ``target``.

    Args:
        value, xt: (B, ...) of equal shape.
        t: a scalar or (B,), in [0, 1].
        source, target: "velocity", "data", "noise" or "score". The score assumes a standard normal source.

    Returns:
        (B, ...) in the dtype of ``value``; half precision is calculated in float32.

    Raises:
        UserError: unknown kind (the nearest is suggested).
        ValueError: shapes differ; t has a wrong shape or range; or ``source`` does not determine ``target``
            at t (the score where sigma = 0, at t = 1; the data from the noise, at t = 0).
    """
    noise, data = lookup(_NOISE, source, "prediction"), lookup(_DATA, source, "prediction")
    result = lookup(_RESULT, target, "prediction")
    if value.shape != xt.shape:
        raise ValueError(f"the prediction has shape {tuple(value.shape)} but xt has shape {tuple(xt.shape)}")
    if source == target:
        return value
    dtype = compute_dtype(value, xt)
    known, x = value.to(dtype), xt.to(dtype)
    c = path.at(t, x)
    return result(lambda: data(known, x, c), lambda: noise(known, x, c), c).to(value.dtype)


def _divide(numerator: Tensor, denominator: Tensor, name: str) -> Tensor:
    if bool((denominator == 0).any()):
        raise ValueError(
            f"this conversion divides by {name}, which is 0 at the given t: the result is not determined. "
            "Keep t away from that end of the path, or convert from the velocity"
        )
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
