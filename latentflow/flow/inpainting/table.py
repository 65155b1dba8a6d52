"""The table of inpainting methods."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .gradient import ot_ode
from .particles import twisted
from .plug_and_play import pnp_flow
from .replacement import repaint, replacement

INPAINTING: dict[str, Callable[..., Tensor]] = {
    "replacement": replacement,
    "repaint": repaint,
    "pnp-flow": pnp_flow,
    "ot-ode": ot_ode,
    "twisted": twisted,
}

DEFAULT_INPAINTING = "pnp-flow"
