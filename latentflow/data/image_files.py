"""Image files: opened in one place, as the formats that are promised and as no others."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from latentflow.errors import UserError, nearest, reason
from latentflow.image_formats import FORMATS, readable_formats

from .members import File, Member, open_stream

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
        raise unreadable(name, _said(error), "Check the path, and that you may read it.") from error
    with decoding(name):
        image = Image.open(place, formats=readable_formats())
    if isinstance(file, Member):
        image.filename = name  # for later messages
    return image


def open_picture(path: str | os.PathLike[str] | Member) -> Image.Image:
    """Return the image in a file or a member, wholly decoded, in its own mode, its EXIF rotation not yet applied.

    Raises:
        ImageFileError: there is no such file, it is no image, damaged, or larger than Pillow decodes
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
        what, fix = f"{name} is not a picture that can be read", f"Formats: {', '.join(FORMATS)}."
        raise ImageFileError(what, "not a picture", fix) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, str(error)) from error
    except Exception as error:
        raise unreadable(name, _said(error)) from error


def _refuse_special(path: Path) -> None:
    """Refuse a pipe, which would be waited for without end, and what is empty."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise unreadable(str(path), "not a regular file", "Give an image file.")
    if not state.st_size:
        raise unreadable(str(path), "the file is empty", "Copy or save it again.")


def _said(error: Exception) -> str:
    return error.strerror.lower() if isinstance(error, OSError) and error.strerror else reason(error)


def _no_file(path: Path) -> ImageFileError:
    if path.is_dir():
        return ImageFileError(f"{path} is a folder", "a folder", "Give one picture in it.")
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, beside)
    fix = f"Did you mean {path.parent / near}?" if near else "Check the path."
    return ImageFileError(f"there is no file {path}", "no such file", fix)


def _too_large(name: str, why: str) -> ImageFileError:
    return ImageFileError(
        f"{name} is too large: {why}", why, f"Shrink it below {Image.MAX_IMAGE_PIXELS} pixels."
    )
