"""Pictures and masks from files."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..errors import UserError, printable

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)


def read_picture(path: str) -> Image:
    """The picture in a file, upright and in sRGB: RGB, or RGBA where it has transparency.

    Raises:
        UserError: no such file, no picture, damaged, or too large.
    """
    from ..data.colours import profile_of
    from ..data.image_files import open_picture
    from ..data.read import upright

    image = open_picture(path)
    profile, name = profile_of(image), printable(path)
    if profile is not None and profile.problem:
        log.warning("%s is read as sRGB: its colour profile cannot be used (%s)", name, profile.problem)
    elif profile is not None:
        log.warning("%s is converted to sRGB from its colour profile, %s", name, profile.name)
    return upright(image)


def read_opaque(path: str) -> Image:
    """The picture in a file as upright RGB, on white, which is said of what is transparent.

    Raises:
        UserError: as ``read_picture``.
    """
    from ..data.read import to_rgb

    picture = read_picture(path)
    if is_transparent(picture):
        log.warning(
            "%s has transparent parts: they lie on white, and all of the result is opaque", printable(path)
        )
    return to_rgb(picture)


def is_transparent(picture: Image) -> bool:
    """Return whether any pixel of an RGB or RGBA image is less than opaque."""
    return picture.mode == "RGBA" and any(picture.getchannel("A").histogram()[:255])


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
