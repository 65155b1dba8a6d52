"""Conversion of images in any mode and orientation to RGB of one size, and to tensors and back."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from ..errors import UserError
from .dataset import Example
from .images import decoding, in_srgb, name_of, unreadable


def read_image(example: Example, resolution: int | tuple[int, int], background: str = "white") -> Image.Image:
    """Return the example as an RGB image of ``resolution`` (a side, or (height, width)).

    EXIF rotation is applied, colours are converted to sRGB by the profile, transparency is composited on
    ``background``, any mode is converted; then the largest part of the right shape, at the example's ``centering``, is
    resized, antialiased.

    Raises:
        UserError: ``background`` is not a colour; the image cannot be decoded.
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    with example.open() as image:
        rgb = to_rgb(image, background)
    return ImageOps.fit(rgb, (width, height), method=Image.Resampling.LANCZOS, centering=example.centering)


def read_own_mask(example: Example, resolution: int | tuple[int, int]) -> Image.Image | None:
    """Return the example's own mask, registered with ``read_image``: mode "L", 0 or 255. None where it has none.

    A mask of another size than its image is brought to that first; every resize takes the nearest pixel.

    Raises:
        UserError: the mask's file is not a mask or cannot be read.
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    mask = example.open_mask()
    if mask is None:
        return None
    with example.open() as image, decoding(name_of(image)):
        size = ImageOps.exif_transpose(image).size
    nearest = Image.Resampling.NEAREST
    whole = mask.resize(size, nearest)
    fitted = ImageOps.fit(whole, (width, height), method=nearest, centering=example.centering)
    return fitted.point(lambda level: 255 * (level >= 128))


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
