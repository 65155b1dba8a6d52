"""The table of inpainting methods."""

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
