"""Checks of numbers from callers and flags: the right kind and range, or an error. Imports errors only."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from ..errors import UserError, shown


def whole(name: str, value: Any, least: int, most: int | None = None, *, fix: str = "") -> int:
    """Return ``value`` as an int if it is a whole number (numpy's are) from ``least`` to ``most``.

    Args:
        name: what a user calls it.
        fix: advice in the error, in place of the range.

    Raises:
        UserError: it is another number, or no whole number: True, 2.0 and "2" are none.
    """
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if is_whole and least <= value and (most is None or value <= most):
        return int(value)
    span = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise UserError(f"{name} is {shown(value)}", fix or f"Give a whole number {span}.")


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a finite number (numpy's are) that a float can hold, and no truth value."""
    try:
        return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # a whole number beyond floats
        return False


def finite(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, fix: str = ""
) -> float:
    """Return ``value`` as a float if it is a finite number from ``least`` to ``most``.

    Args:
        name: what a user calls it.
        fix: advice in the error, in place of the range.

    Raises:
        UserError: it is NaN, infinite, out of range, or no number: True and "2" are none.
    """
    if is_number(value) and least <= value <= most:
        return float(value)
    span = "."
    if math.isfinite(least):
        span = f" from {least:g} to {most:g}." if math.isfinite(most) else f" of at least {least:g}."
    raise UserError(f"{name} is {shown(value)}", fix or f"Give a finite number{span}")
