"""Inpainting without training: methods over any velocity, one table.

A method is ``method(velocity, x0, known, mask, times, *, solver, generator, callback, progress, ...)`` with settings of
its own; ``solver=None`` is the method's own choice. A new one is a function and a line in ``INPAINTING``.
"""

from __future__ import annotations

from .table import DEFAULT_INPAINTING as DEFAULT_INPAINTING
from .table import INPAINTING as INPAINTING
