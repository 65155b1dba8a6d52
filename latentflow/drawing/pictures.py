"""Pictures and masks from files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


def read_picture(path: str) -> Image:
    """The picture in a file as upright RGB; what is transparent lies on white.

    Raises:
        UserError: no such file, no picture, damaged, or too large.
    """
    from ..data.image_files import open_picture
    from ..data.read import to_rgb

    return to_rgb(open_picture(path))


def read_mask_of(path: str, picture: Image, threshold: float | None = None) -> Image:
    """The mask in a file (mode "L", 255 = repaint), in the picture's size.

    Raises:
        UserError: as ``read_picture``; or it is in colour and there is no threshold.
    """
    from ..data.image_files import open_picture
    from ..data.mask_files import read_mask

    mask = open_picture(path)
    mask.filename = path  # type: ignore[attr-defined]  # named in errors
    try:
        return read_mask(mask, picture.size, threshold=threshold)
    except UserError as error:
        if threshold is None and "threshold" in error.fix:
            raise UserError(
                error.what, f"{error.fix}\nThe threshold is --mask-threshold, such as 0.5."
            ) from None
        raise
