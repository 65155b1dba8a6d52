"""Masks as users bring them: any mode and orientation to one grey channel, white where to repaint."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from latentflow.errors import UserError

from .image_files import decoding, loaded, name_of

log = logging.getLogger(__name__)

# Levels of 255 that the channels of a grey picture may differ by, and that JPEG leaves around an edge.
_TOLERANCE = 16
_LOSSY = ("JPEG", "MPO")


def read_mask(
    image: Image.Image, size: tuple[int, int] | None = None, *, threshold: float | None = None
) -> Image.Image:
    """A mask as one 8-bit channel (mode "L"), upright: 255 repaint, 0 keep, between them soft.

    Grey pictures of any mode are read by their brightness, on the scale of 0..1, 0..255 or 0..65535 that their
    largest value fits in (so a label map of 0 and 1 is a mask too). A grey photograph cannot be told from a soft
    mask and is read as one. In a JPEG, levels next to black or white become black or white.

    Transparency, where there is any, is read as a layer painted in an image editor: transparent parts are kept,
    greys count as much as they are opaque (brightness times alpha), and a layer painted in one colour other than
    grey is to be repainted as much as it is opaque. Only black on transparent is refused: the paint, or the hole
    in it, may be meant.

    Args:
        image: in any of Pillow's modes; EXIF rotation is applied.
        size: (width, height) of the result; a mask of another size is resized to the nearest pixel, and a
            warning is logged.
        threshold: in [0, 1]; a luminance of at least this repaints, everything else is kept. Makes a mask of any
            picture.

    Raises:
        UserError: the picture is in colour and there is no threshold; it cannot be decoded; the threshold is not
            in [0, 1].
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(
            f"threshold is {threshold}", "Give a luminance from 0 (black) to 1 (white), such as 0.5."
        )
    name = f"the mask {getattr(image, 'filename', '')}".rstrip()
    lossy = image.format in _LOSSY
    loaded(image, name)
    with decoding(name):
        upright = ImageOps.exif_transpose(image)
    levels = _levels(upright, name, coloured=threshold is not None)
    if threshold is not None:
        levels = np.where(levels >= threshold * 255, np.uint8(255), np.uint8(0))
    elif lossy:
        levels = np.where(levels <= _TOLERANCE, np.uint8(0), levels)
        levels = np.where(levels >= 255 - _TOLERANCE, np.uint8(255), levels)
    mask = Image.fromarray(levels)
    if size is None or mask.size == size:
        return mask
    log.warning("%s is %d x %d, the picture %d x %d: resized to the nearest pixel", name, *mask.size, *size)
    return mask.resize(size, Image.Resampling.NEAREST)


def alpha_mask(image: Image.Image) -> Image.Image | None:
    """The alpha channel as a mask, upright: transparent parts (alpha 0) are 255, to be repainted.

    None where nothing is transparent.
    """
    with decoding(name_of(image)):
        upright = ImageOps.exif_transpose(image)
        if not upright.has_transparency_data:
            return None
        mask = ImageOps.invert(upright.convert("RGBA").getchannel("A"))
    return mask if mask.getbbox() else None


def without_alpha(image: Image.Image) -> Image.Image:
    """The picture, upright, as if nothing in it were transparent: the colours that its file holds there."""
    with decoding(name_of(image)):
        upright = ImageOps.exif_transpose(image)
        return upright.convert("RGBA").convert("RGB") if upright.has_transparency_data else upright


def _levels(image: Image.Image, name: str, *, coloured: bool) -> NDArray[np.uint8]:
    """(H, W): how much is to be repainted; colours are an error unless ``coloured``."""
    if image.mode.startswith("I") or image.mode == "F":
        return _full_scale(np.asarray(image), name)
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        colours, alpha = rgba[..., :3], rgba[..., 3]
        if alpha.min() < 255:
            return _painted_levels(colours, alpha, name, coloured)
        image = Image.fromarray(np.ascontiguousarray(colours))
    if image.mode in ("1", "L"):
        return _full_scale(np.asarray(image.convert("L")), name)
    colours = np.asarray(image.convert("RGB"))
    if not coloured and not _is_grey(colours):
        raise _not_a_mask(name)
    return _full_scale(_luminance(colours), name)


def _painted_levels(
    colours: NDArray[np.uint8], alpha: NDArray[np.uint8], name: str, coloured: bool
) -> NDArray[np.uint8]:
    """Levels of a picture (H, W, 3) with transparent parts."""
    seen = colours[alpha > 0]
    if not len(seen):
        return np.zeros_like(alpha)
    if coloured or _is_grey(seen):
        if not coloured and seen.max() <= _TOLERANCE:
            raise UserError(
                f"{name} is black on transparent: its paint may be meant, or the hole in it",
                "Paint in white what is to be repainted.",
            )
        return np.rint(_luminance(colours) * (alpha / 255)).astype(np.uint8)
    if int(np.ptp(seen, axis=0).max()) > _TOLERANCE:
        raise _not_a_mask(name)
    return alpha


def _is_grey(colours: NDArray[np.uint8]) -> bool:
    return int(np.ptp(colours, axis=-1).max()) <= _TOLERANCE


def _luminance(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) of (H, W, 3)."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(colours)).convert("L"))


def _full_scale(values: NDArray[np.generic], name: str) -> NDArray[np.uint8]:
    """Numbers on any of the scales that programs write, as 0..255."""
    numbers = values.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise UserError(f"{name} holds infinite or undefined values", "Write numbers from 0 to 1.")
    full = next((limit for limit in (1.0, 255.0) if numbers.max() <= limit), 65535.0)
    return np.rint(numbers / full * 255).clip(0, 255).astype(np.uint8)


def _not_a_mask(name: str) -> UserError:
    return UserError(
        f"{name} is not a mask: it is in colour",
        "Give a grey picture, white where to repaint and black where to keep, or a threshold in [0, 1] "
        "(bright enough is repainted).",
    )
