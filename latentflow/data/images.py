"""Image files: opened as the promised formats only; converted to sRGB, to RGB of one size, to tensors and back."""

from __future__ import annotations

import functools
import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import UserError, printable, reason
from ..utils.names import find_path, near_path
from .sources.files import File, Member, file_state, hash_stream, open_stream

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
        key = hash_stream(stream)
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


#: Pillow's names. Some of its other formats are programs: PostScript, whatever the file's name, goes to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")


def readable_formats() -> list[str]:
    """Return the ``FORMATS`` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def open_no_others() -> None:
    """Keep Pillow from opening any other format in this process, whoever asks.

    A server needs this: its framework opens the uploads of strangers before any code of ours sees them.
    """
    kept = readable_formats()
    for other in set(Image.OPEN) - set(kept):
        del Image.OPEN[other]
    Image.ID[:] = kept


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
        path = find_path(Path(path).expanduser())
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
    return ImageFileError(
        f"there is no file {path}", "no such file", near_path(str(path)).strip() or "Check the path."
    )


def _too_large(name: str, why: str) -> ImageFileError:
    return ImageFileError(
        f"{name} is too large: {why}", why, f"Shrink it below {Image.MAX_IMAGE_PIXELS} pixels."
    )


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Return an image in any of Pillow's modes and of any colour profile as upright sRGB, at its own size.

    Raises:
        UserError: ``background`` is not a colour; the image cannot be decoded.
    """
    colour = parse_colour(background)
    image = upright(image)
    if image.mode == "RGBA":
        canvas = Image.new("RGBA", image.size, (*colour, 255))
        image = Image.alpha_composite(canvas, image).convert("RGB")
    return image


def upright(image: Image.Image) -> Image.Image:
    """Return an image of any mode and profile upright in sRGB: RGB or, where it has transparency, RGBA.

    Raises:
        UserError: the image cannot be decoded.
    """
    name = name_of(image)
    with decoding(name):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _wide_to_grey(image, name)
    image = in_srgb(image)
    with decoding(name):
        return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _wide_to_grey(image: Image.Image, name: str) -> Image.Image:
    """Convert 16-bit, 32-bit and float greyscale to 8 bits. Pillow's own conversion would clip it at 255."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise unreadable(name, "it holds infinite or undefined values", "Write numbers from 0 to 1.")
    if values.max() > 65535 or values.min() < 0:
        reach = f"its values reach from {values.min():g} to {values.max():g}"
        raise unreadable(name, reach, "Save it with 8 or 16 bits a pixel, or as numbers from 0 to 1.")
    if image.mode == "F":  # floats carry no scale of their own; programs write 0..1, 0..255, 0..65535
        full = next((limit for limit in (1.0, 255.0) if values.max() <= limit), 65535.0)
    else:  # mode I also holds 16-bit values; only an image that never leaves 8 bits is read as such
        full = 255.0 if image.mode == "I" and values.max() <= 255 else 65535.0
    grey = Image.fromarray(np.rint(values / full * 255).astype(np.uint8))
    grey.info = {key: value for key, value in image.info.items() if key == "icc_profile"}
    return grey


def parse_colour(name: str) -> tuple[int, int, int]:
    """Return a colour name or ``#rrggbb`` as three numbers up to 255."""
    try:
        red, green, blue = ImageColor.getrgb(name)[:3]
    except ValueError:
        fix = "Give a name such as white, black or grey, or a code such as #ff8800."
        raise UserError(f"'{name}' is not a colour", fix) from None
    return red, green, blue


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as (3, H, W) float32 in [-1, 1]."""
    return pixels_to_images(to_pixels(image))


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as (3, H, W) uint8."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def pixels_to_images(pixels: Tensor) -> Tensor:
    """Return uint8 of any shape as float32 in [-1, 1]."""
    return pixels.to(torch.float32) / 127.5 - 1


def to_pil(image: Tensor) -> Image.Image:
    """Return (3, H, W) in [-1, 1] as an RGB image; values outside are clipped. Undoes ``to_tensor`` exactly."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"expected one image (3, H, W), got {tuple(image.shape)}: pass one row of a batch")
    levels = ((image.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
