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


def fit_size(shape: tuple[int, int], height: int | None, width: int | None, multiple: int) -> tuple[int, int]:
    """Return (height, width) as asked for; a side that nobody asks for follows from the other and a shape.

    Args:
        shape: (height, width) of any scale.
        height, width: one of them, or both.
        multiple: the side that follows is the nearest multiple of this.
    """

    def nearest(side: float) -> int:
        return max(1, round(side / multiple)) * multiple

    if height is None:
        assert width is not None
        return nearest(width * shape[0] / shape[1]), width
    return height, nearest(height * shape[1] / shape[0]) if width is None else width
