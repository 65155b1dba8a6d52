"""Image files: opened as the promised formats only, and converted to sRGB."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from ..errors import UserError, nearest, printable, reason
from ..utils.image_formats import FORMATS, readable_formats
from .sources.files import File, Member, file_state, open_stream

_TOLERANCE = 1  # levels of 255 by which profiles of sRGB differ, which many programs write in their own way
_LONGEST, _LARGEST = 60, 2**22  # characters of a profile's name, bytes of a profile; some are kept


@dataclass(frozen=True)
class Profile:
    """A colour profile other than sRGB in an image: its name, or the ``problem`` for which it cannot be used."""

    name: str
    problem: str = ""


def in_srgb(image: Image.Image) -> Image.Image:
    """Return the image in sRGB and without a profile: RGB or grey, its alpha as it was.

    The intent is relative colorimetric with black-point compensation. Without a profile, with one of sRGB, or with one
    that cannot be used, the pixels and the mode stay as they are.
    """
    if "icc_profile" not in image.info:
        return image
    bare, mode = image.copy(), _colours_of(image)
    _, convert = _conversion(bare.info.pop("icc_profile"), mode)
    if convert is None:
        return bare
    if not bare.has_transparency_data:
        return convert(bare.convert(mode))
    whole = bare.convert("LA" if mode == "L" else "RGBA")
    converted = convert(whole.convert(mode))
    converted.putalpha(whole.getchannel("A"))
    return converted


def profile_of(image: Image.Image) -> Profile | None:
    """Return the profile that the colours of an image are converted from; None where they are in sRGB.

    Only embedded ICC profiles count: Pillow reports no other (gAMA, cHRM and cICP in a PNG).
    """
    if "icc_profile" not in image.info:
        return None
    return _conversion(image.info["icc_profile"], _colours_of(image))[0]


def key_and_profile(file: File) -> tuple[str, Profile | None]:
    """Return the hexadecimal hash of an image file's bytes (`file_key`) and `profile_of` the image, from one reading.

    The profile is None where the image cannot be read.
    """
    return _key_and_profile(*file_state(file))


@functools.lru_cache(maxsize=1_000_000)
def _key_and_profile(file: File, size: int, modified: int) -> tuple[str, Profile | None]:
    with open_stream(file) as stream:
        key = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        try:
            return key, profile_of(open_image(stream))
        except ImageFileError:
            return key, None


@functools.lru_cache(maxsize=32)
def _conversion(
    profile: object, mode: str
) -> tuple[Profile | None, Callable[[Image.Image], Image.Image] | None]:
    """Return the profile that Pillow read from a file, and a function that converts colours by it to sRGB.

    The profile is None where it is sRGB, the function where it is or where the profile has a problem. The colours are
    of ``mode`` (L, RGB or CMYK), without alpha.
    """
    # Pillow gives None where it could not join the profile's parts, and numbers from a damaged TIFF.
    if not isinstance(profile, bytes):
        return Profile("unknown", "it is damaged"), None
    ramp = Image.frombytes("L", (256, 1), bytes(range(256)))
    if len(profile) > _LARGEST:
        return Profile("unknown", f"it has {len(profile)} bytes"), None
    name = "unknown"
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space.strip()
        name = printable(" ".join((opened.profile.profile_description or space).split()))[:_LONGEST]
        of = "RGB" if mode == "L" and space == "RGB" else mode  # grey is a colour of an RGB profile too
        transform = ImageCms.buildTransform(
            opened,
            ImageCms.createProfile("sRGB"),
            of,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION | (ImageCms.Flags.NOOPTIMIZE if mode == "L" else 0),
        )
        probe = ramp.convert(of) if mode == "L" else _probe()
        seen = None if mode == "CMYK" else transform.apply(probe)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        return Profile(name, reason(error)), None

    def convert(image: Image.Image) -> Image.Image:
        converted = transform.apply(image)
        converted.info.clear()  # a profile of sRGB, which images without one are in
        return converted

    if seen is None:
        return Profile(name), convert
    if np.abs(np.asarray(seen) - np.asarray(probe.convert("RGB"), dtype=int)).max() <= _TOLERANCE:
        return None, None
    if mode == "L":
        levels = list(seen.convert("L").tobytes())
        return Profile(name), lambda image: image.point(levels)
    return Profile(name), convert


def _probe() -> Image.Image:
    """Return colours all over RGB, 17 levels of each, and all greys."""
    levels = np.linspace(0, 255, 17).round()
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(1, -1, 3)
    greys = np.repeat(np.arange(256.0)[None, :, None], 3, axis=2)
    return Image.fromarray(np.concatenate([colours, greys], axis=1).astype(np.uint8))


def _colours_of(image: Image.Image) -> str:
    """Return the mode of an image's colours without its alpha: L, RGB or CMYK."""
    if image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I"):
        return "L"
    return "CMYK" if image.mode == "CMYK" else "RGB"


_DAMAGED = "It may be damaged or cut off: copy or save it again."


class ImageFileError(UserError):
    """An image that cannot be read; ``why`` is the reason alone, for lists of names and reasons."""

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what, fix)
        self.why = why or what


def unreadable(name: str, why: str, fix: str = _DAMAGED) -> ImageFileError:
    """Return the error for an image that cannot be read."""
    return ImageFileError(f"{name} cannot be read: {why}", why, fix)


def open_image(file: File | BinaryIO) -> Image.Image:
    """Return the image in a file, a member or a stream, not yet decoded, in its own mode, not yet turned by EXIF.

    Raises:
        ImageFileError: there is no such file, it is of none of ``FORMATS``, damaged, or has far too many pixels.
    """
    name = str(file)
    try:
        if isinstance(file, Path):
            _refuse_special(file)
        place = open_stream(file) if isinstance(file, Member) else file
    except OSError as error:
        raise unreadable(name, _why(error), "Check the path, and that you may read it.") from error
    with decoding(name):
        image = Image.open(place, formats=readable_formats())
    if isinstance(file, Member):
        image.filename = name  # for later messages
    return image


def decode_image(path: str | os.PathLike[str] | Member) -> Image.Image:
    """Return the image in a file or a member, wholly decoded, in its own mode, its EXIF rotation not yet applied.

    Raises:
        ImageFileError: there is no such file, it is not an image, damaged, or larger than Pillow decodes
            (``PIL.Image.MAX_IMAGE_PIXELS``).
    """
    if not isinstance(path, Member):
        path = Path(path).expanduser()
        if not path.is_file():
            raise _no_file(path)
    with open_image(path) as image:
        loaded(image)
        with decoding(str(path)):
            image.getexif()  # in a TIFF it is read from the file
        return image


def loaded(image: Image.Image, name: str | None = None) -> Image.Image:
    """Return the image, decoded.

    Raises:
        ImageFileError: it is damaged, or has more pixels than Pillow's limit.
    """
    name = name or name_of(image)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:  # Pillow refuses only from twice that on
        raise _too_large(name, f"{image.width} x {image.height} pixels")
    with decoding(name):
        image.load()
    return image


def name_of(image: Image.Image) -> str:
    """Return the file that an image was opened from, for messages."""
    return str(getattr(image, "filename", "") or "the image")


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises on a damaged image into an `ImageFileError`.

    Its decoders raise nearly anything, so nothing but calls of Pillow's own belongs inside.
    """
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as error:
        what, fix = f"{name} is not an image that can be read", f"Formats: {', '.join(FORMATS)}."
        raise ImageFileError(what, "not an image", fix) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, str(error)) from error
    except Exception as error:
        raise unreadable(name, _why(error)) from error


def _refuse_special(path: Path) -> None:
    """Refuse a pipe, which might never send anything, and an empty file."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise unreadable(str(path), "not a regular file", "Give an image file.")
    if not state.st_size:
        raise unreadable(str(path), "the file is empty", "Copy or save it again.")


def _why(error: Exception) -> str:
    return error.strerror.lower() if isinstance(error, OSError) and error.strerror else reason(error)


def _no_file(path: Path) -> ImageFileError:
    if path.is_dir():
        return ImageFileError(f"{path} is a folder", "a folder", "Give one image in it.")
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, beside)
    fix = f"Did you mean {path.parent / near}?" if near else "Check the path."
    return ImageFileError(f"there is no file {path}", "no such file", fix)


def _too_large(name: str, why: str) -> ImageFileError:
    return ImageFileError(
        f"{name} is too large: {why}", why, f"Shrink it below {Image.MAX_IMAGE_PIXELS} pixels."
    )
