"""Inpainting without training: methods over any velocity, one table.

A method is ``method(velocity, x0, known, mask, times, *, solver, generator, callback, progress, ...)`` with settings of
its own; ``solver=None`` is the method's own choice. A new one is a function and a line in ``INPAINTING``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .particles import twisted
from .plug_and_play import pnp_flow
from .replacement import repaint, replacement

INPAINTING: dict[str, Callable[..., Tensor]] = {
    "replacement": replacement,
    "repaint": repaint,
    "pnp-flow": pnp_flow,
    "twisted": twisted,
}
DEFAULT_INPAINTING = "pnp-flow"
