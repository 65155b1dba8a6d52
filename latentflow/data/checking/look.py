"""What one picture is, found by decoding it once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import Image, ImageOps

from latentflow.errors import UserError

from ..examples import Example
from ..image_files import ImageFileError, decoding, name_of
from ..read import to_rgb

THUMBNAIL = 8  # pixels, the side of what near duplicates are compared by
_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = range(5, 9)  # orientations that swap width and height
_ENOUGH = 128  # pixels of the short side that a fingerprint needs
_REDUCIBLE = ("L", "LA", "RGB", "RGBA", "CMYK")


@dataclass(frozen=True, slots=True)
class Look:
    """One picture, opened: what it is, or why it cannot be read.

    Attributes:
        width, height: after EXIF rotation.
        mode, format: Pillow's names.
        rotated: whether EXIF turns or mirrors it.
        animated: whether it has more frames than the first, which is what is used.
        key: the example's content key.
        hash: perceptual hash (64 bits, as a signed number): few bits differ between copies of one picture.
        thumbnail: RGB pixels, ``THUMBNAIL`` x ``THUMBNAIL``, row by row.
        mask_width, mask_height: of its mask, 0 where there is none.
        profile: the name of its colour profile where that is another than sRGB.
        profile_problem: why the profile cannot be used.
        error: why it cannot be used; everything else is then empty.
        mask_error: why its mask cannot be used.
    """

    width: int = 0
    height: int = 0
    mode: str = ""
    format: str = ""
    rotated: bool = False
    animated: bool = False
    key: str = ""
    hash: int = 0
    thumbnail: bytes = b""
    mask_width: int = 0
    mask_height: int = 0
    profile: str = ""
    profile_problem: str = ""
    error: str | None = None
    mask_error: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    @property
    def mask_size(self) -> tuple[int, int] | None:
        return (self.mask_width, self.mask_height) if self.mask_width else None


def look_at(example: Example) -> Look:
    """The picture and its mask, decoded. What cannot be read is a result, not an error."""
    try:
        look = _look_at(example)
    except UserError as error:
        return Look(error=error.why if isinstance(error, ImageFileError) else error.what)
    try:
        mask = example.open_mask()
    except UserError as error:
        return dataclasses.replace(look, mask_error=error.what)
    return look if mask is None else dataclasses.replace(look, mask_width=mask.width, mask_height=mask.height)


def look_at_all(examples: list[Example]) -> list[Look]:
    return [look_at(example) for example in examples]


def _look_at(example: Example) -> Look:
    with example.open() as image:
        width, height = image.size
        mode, format = image.mode, image.format or ""
        with decoding(name_of(image)):
            # A JPEG is decoded at an eighth of its size where that is enough: all its data are read, the fewer
            # pixels only save time.
            image.draft(None, (_ENOUGH, _ENOUGH))  # None keeps the mode
            image.load()
            orientation = image.getexif().get(_ORIENTATION, 1)
            animated = format != "MPO" and bool(getattr(image, "is_animated", False))
            turned = ImageOps.exif_transpose(image)
        hash, thumbnail = _fingerprint(turned)
    if orientation in _TURNED:
        width, height = height, width
    look = Look(
        width, height, mode, format, orientation != 1, animated, example.content_key(), hash, thumbnail
    )
    profile = example.profile()
    if profile is None:
        return look
    return dataclasses.replace(look, profile=profile.name, profile_problem=profile.problem)


def _fingerprint(upright: Image.Image) -> tuple[int, bytes]:
    factor = min(upright.size) // _ENOUGH
    if factor > 1 and upright.mode in _REDUCIBLE and "transparency" not in upright.info:
        upright = upright.reduce(factor)
    small = to_rgb(upright).resize((64, 64), Image.Resampling.BOX)
    bits = np.packbits(imagehash.phash(small).hash)
    thumbnail = small.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return int(bits.view(np.dtype(">i8"))[0]), thumbnail.tobytes()
