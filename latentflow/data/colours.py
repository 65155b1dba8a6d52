"""Colour profiles: what a network sees and what is written is sRGB, whatever space an image was saved in."""

from __future__ import annotations

import functools
import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

from latentflow.errors import printable, reason

from .image_files import ImageFileError, open_image
from .members import File, Member, open_stream

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
    conversion = _conversion(bare.info.pop("icc_profile"), mode)
    if conversion.profile is None or conversion.profile.problem:
        return bare
    if not bare.has_transparency_data:
        return conversion.of(bare.convert(mode))
    whole = bare.convert("LA" if mode == "L" else "RGBA")
    done = conversion.of(whole.convert(mode))
    done.putalpha(whole.getchannel("A"))
    return done


def profile_of(image: Image.Image) -> Profile | None:
    """Return the profile that the colours of an image are converted from; None where they are sRGB, or said to be.

    A profile is what is embedded as an ICC profile; Pillow tells of no other (gAMA, cHRM and cICP in a PNG).
    """
    if "icc_profile" not in image.info:
        return None
    return _conversion(image.info["icc_profile"], _colours_of(image)).profile


def key_and_profile(file: File) -> tuple[str, Profile | None]:
    """Return the hexadecimal hash of an image file's bytes (`file_key`) and `profile_of` the image, from one reading.

    The profile is None where the image cannot be read.
    """
    if isinstance(file, Member):
        return _key_and_profile(file, 0, 0)
    state = file.stat()
    return _key_and_profile(file, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1_000_000)
def _key_and_profile(file: File, size: int, modified: int) -> tuple[str, Profile | None]:
    with open_stream(file) as stream:
        key = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        try:
            return key, profile_of(open_image(stream))
        except ImageFileError:
            return key, None


@dataclass(frozen=True)
class _Conversion:
    """Conversion of colours by a profile: none without one, or where it has a problem."""

    profile: Profile | None = None
    transform: ImageCms.ImageCmsTransform | None = None
    table: list[int] | None = None  # of grey

    def of(self, image: Image.Image) -> Image.Image:
        """Return the colours of an image without alpha in sRGB."""
        if self.table is not None:
            return image.point(self.table)
        assert self.transform is not None
        done = self.transform.apply(image)
        done.info.clear()  # it says that it is in sRGB, as images without a profile are
        return done


@functools.lru_cache(maxsize=32)
def _conversion(profile: object, mode: str) -> _Conversion:
    """Return the conversion of colours of ``mode`` (L, RGB or CMYK) by ``profile``, which Pillow read from a file."""
    # Pillow gives nothing where it could not put it together, and numbers from a damaged TIFF.
    if not isinstance(profile, bytes):
        return _Conversion(Profile("unknown", "it is damaged"))
    ramp = Image.frombytes("L", (256, 1), bytes(range(256)))
    if len(profile) > _LARGEST:
        return _Conversion(Profile("unknown", f"it has {len(profile)} bytes"))
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
        return _Conversion(Profile(name, reason(error)))
    if seen is None:
        return _Conversion(Profile(name), transform)
    before = np.asarray(probe.convert("RGB"), dtype=int)
    if np.abs(np.asarray(seen) - before).max() <= _TOLERANCE:
        return _Conversion()
    if mode == "L":
        return _Conversion(Profile(name), table=list(seen.convert("L").tobytes()))
    return _Conversion(Profile(name), transform)


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
