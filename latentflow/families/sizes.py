"""Sizes of images that a flow model can draw."""

from __future__ import annotations

from ..errors import UserError


def check_size(height: int, width: int, multiple: int) -> None:
    """Refuse a size in pixels whose sides are not multiples of ``multiple``.

    Raises:
        UserError: names the multiple and the nearest sides that fit.
    """
    for what, side in (("height", height), ("width", width)):
        if side <= 0 or side % multiple:
            below = side // multiple * multiple
            fitting = f"{below} and {below + multiple}" if below > 0 else str(multiple)
            raise UserError(
                f"{what} {side} is not a multiple of {multiple}, as this checkpoint needs",
                f"Nearest: {fitting}.",
            )
