"""Inpainting without training: methods over any velocity, one table.

A new method is a function ``fill(problem, solver, **settings)``, without the solver where its steps are its own, and a
line in ``INPAINTING``.
"""

from __future__ import annotations

from .base import Inpainting
from .particles import twisted
from .replacement import pnp_flow, repaint, replacement

INPAINTING: dict[str, Inpainting] = {
    method.name: method
    for method in (
        Inpainting("replacement", replacement, solver="heun"),
        Inpainting("repaint", repaint, solver="euler"),
        Inpainting("pnp-flow", pnp_flow),
        Inpainting("twisted", twisted),
    )
}
DEFAULT_INPAINTING = "pnp-flow"
