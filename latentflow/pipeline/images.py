"""Images and masks of a call: in any form that callers bring them, to tensors in [0, 1]."""

from __future__ import annotations

import logging
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..data.images import profile_of, to_pixels, to_rgb, upright
from ..data.masks import read_mask
from ..errors import UserError
from ..families.model import Size
from ..utils.memory import require_memory

log = logging.getLogger(__name__)

_OF_LATENTS = 'Latents are decoded first: pipe.to_images(latents, "pt"); an edit takes them as latents=.'

#: A PIL image, an array ((B,) H, W, C), a tensor ((B,) C, H, W), both in [0, 1], or a list of these.
Images: TypeAlias = Any


def read_images(
    images: Images, height: int | None = None, width: int | None = None, name: str = "image"
) -> Tensor:
    """Return images as (N, 3, H, W) float32 in [0, 1]; of any mode of Pillow's, as upright RGB on white ground.

    PIL images with a colour profile other than sRGB are converted to it.

    Args:
        images: as ``Images``, with 1 (grey), 3 or 4 (RGBA) channels.
        height, width: resize to them; default: their own, which must be one for all.
        name: of the argument, for errors.

    Raises:
        UserError: not images; values outside [0, 1]; several sizes where none is asked for.
    """
    rows = [row for image in sized_list(images, name) for row in _rgb(image)]
    if height and width:
        require_memory(f"{len(rows)} images of {width} x {height} pixels", 12 * len(rows) * width * height)
    rows = [resized(row[None], (height or row.shape[1], width or row.shape[2]))[0] for row in rows]
    sizes = sorted({f"{row.shape[2]} x {row.shape[1]}" for row in rows})
    if len(sizes) > 1:
        raise UserError(
            f"the images have several sizes: {', '.join(sizes)}",
            "Resize them to one size first, or give height and width where there are such settings.",
        )
    return torch.stack(rows)


def transparent_again(images: list[Image.Image], inputs: Images, painted: Tensor) -> list[Image.Image]:
    """Return images with the transparency of the inputs that they were painted on; those of opaque ones as they are.

    What was kept has its image's own colours and alpha, to the byte and under alpha 0 too; what was painted is
    opaque; in between both blend, so that on white an image looks as it did.

    Args:
        images: B RGB images, painted on white ground.
        inputs: P ``Images`` as `read_images` takes them; image b belongs to input b * P // B.
        painted: (M, 1, H, W) in [0, 1], the share of every pixel that was painted; of image b row b * M // B.
    """
    originals = [row for value in sized_list(inputs, "image") for row in _rgba(value)]
    count, result = len(images), []
    for number, image in enumerate(images):
        original = originals[number * len(originals) // count]
        share = painted[number * len(painted) // count, 0, :, :, None].double().cpu().numpy()
        result.append(image if original is None else _uncovered(image, original, share))
    return result


def _uncovered(
    image: Image.Image, original: Image.Image, painted: np.ndarray[Any, np.dtype[np.float64]]
) -> Image.Image:
    """Return RGBA that looks on white as ``image`` does: opaque where ``painted`` (H, W, 1), else the original."""
    kept = np.asarray(original if original.size == image.size else original.resize(image.size))
    alpha = painted + (1.0 - painted) * (kept[..., 3:] / 255.0)
    ground = 255.0 * (1.0 - alpha)
    colours = (np.asarray(image) - ground) / np.where(alpha > 0, alpha, 1.0)
    drawn = np.rint(np.concatenate([colours, 255.0 * alpha], axis=2)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.where(painted > 0, drawn, kept))


def read_masks(masks: Images, size: Size) -> Tensor:
    """Return masks as (N, 1, H, W) float32 in [0, 1], 1 = repaint; resized to ``size``, with a warning.

    Args:
        masks: as ``Images`` with one channel, which arrays and tensors may leave out: (H, W) or (B, H, W).
        size: of the images.

    Raises:
        UserError: not masks; values outside [0, 1].
    """
    rows = []
    for mask in sized_list(masks, "mask_image"):
        if isinstance(mask, Image.Image):
            grey = read_mask(mask, (size[1], size[0]))
            rows.append(torch.from_numpy(np.array(grey))[None, None].float() / 255.0)
        else:
            rows.append(_resized_mask(_mask_rows(mask), size))
    return torch.cat(rows)


def sized_list(values: Images, name: str) -> list[Any]:
    """Return one or several images as a list.

    Raises:
        UserError: there is none, or something else among them; it is called by ``name``.
    """
    rows = list(values) if isinstance(values, list | tuple) else [values]
    kinds = (Image.Image, np.ndarray, Tensor)
    for value in rows:
        if not isinstance(value, kinds):
            raise UserError(
                f"{name} is {type(value).__name__}", "Pass PIL images, numpy arrays or torch tensors."
            )
    if not rows:
        raise UserError(f"{name} is an empty list", "Pass at least one.")
    return rows


def _rgb(image: Image.Image | np.ndarray[Any, Any] | Tensor) -> Tensor:
    """Return the images in one entry of a list, (n, 3, H, W)."""
    if isinstance(image, Image.Image):
        profile = profile_of(image)
        if profile is not None and profile.problem:
            log.warning("an image is read as sRGB: its colour profile cannot be used (%s)", profile.problem)
        return to_pixels(to_rgb(image))[None].float() / 255.0
    values = _channels_first(image) if image.ndim in (3, 4) else torch.empty(0, 0)
    channels = values.shape[1]
    if channels not in (1, 3, 4):
        shape, layout = (
            tuple(image.shape),
            "(B, H, W, 3)" if isinstance(image, np.ndarray) else "(B, 3, H, W)",
        )
        fix = f"Pass {layout}; grey (1) and RGBA (4 channels) will do."
        raise UserError(
            f"image has shape {shape}", fix if isinstance(image, np.ndarray) else f"{fix} {_OF_LATENTS}"
        )
    _check_range(values, "image")
    if channels == 4:
        return values[:, :3] * values[:, 3:] + (1.0 - values[:, 3:])
    return values.expand(-1, 3, -1, -1)


def _rgba(value: Image.Image | np.ndarray[Any, Any] | Tensor) -> list[Image.Image | None]:
    """Return the images in one entry of a list as RGBA, None for each that has no alpha."""
    if isinstance(value, Image.Image):
        image = upright(value)
        return [image if image.mode == "RGBA" else None]
    rows = _channels_first(value)
    if rows.shape[1] != 4:
        return [None] * len(rows)
    levels = (rows * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(np.ascontiguousarray(row)) for row in levels.numpy()]


def _mask_rows(mask: np.ndarray[Any, Any] | Tensor) -> Tensor:
    values = mask if mask.ndim != 2 else mask[None]
    if values.ndim == 3 and not (isinstance(values, np.ndarray) and values.shape[-1] == 1):
        values = values[..., None] if isinstance(values, np.ndarray) else values[:, None]
    rows = _channels_first(values) if values.ndim in (3, 4) else torch.empty(0, 0)
    if rows.shape[1] != 1:
        raise UserError(
            f"mask_image has shape {tuple(mask.shape)}",
            "Pass one channel: (H, W), (B, H, W), or (B, H, W, 1) as an array, (B, 1, H, W) as a tensor.",
        )
    _check_range(rows, "mask_image")
    return rows


def _channels_first(values: np.ndarray[Any, Any] | Tensor) -> Tensor:
    """Return arrays (..., H, W, C) and tensors (..., C, H, W) as (B, C, H, W) float32."""
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "buif":
            raise UserError(f"an array of dtype {values.dtype}", "Pass numbers in [0, 1], such as float32.")
        values = torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, -1, -3), dtype=np.float32))
    elif values.is_complex():
        raise UserError(f"a tensor of dtype {values.dtype}", "Pass real numbers in [0, 1].")
    values = values.detach().cpu().float()
    return values if values.ndim != 3 else values[None]


def _check_range(values: Tensor, name: str) -> None:
    if not values.numel():
        raise UserError(f"{name} is empty", "Pass at least one pixel.")
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= 1.0):
        fix = (
            "Divide by 255."
            if low >= 0.0 and high <= 255.0
            else "Bring them to [0, 1]; from [-1, 1]: x / 2 + 0.5."
        )
        if name == "image" and low < 0.0:  # RGBA and latents may have as many channels
            fix += f" {_OF_LATENTS}"
        raise UserError(f"{name} has values from {low:g} to {high:g}, not within [0, 1]", fix)


def resized(images: Tensor, size: Size) -> Tensor:
    """Return images (B, C, H, W) in [0, 1] at another (height, width), antialiased."""
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0.0, 1.0)


def padded(images: Tensor, size: Size) -> Tensor:
    """Return images (B, C, H, W) with their last row and column repeated up to (height, width)."""
    missing = (size[1] - images.shape[-1], size[0] - images.shape[-2])
    return F.pad(images, (0, missing[0], 0, missing[1]), mode="replicate") if any(missing) else images


def _resized_mask(masks: Tensor, size: Size) -> Tensor:
    own = tuple(masks.shape[-2:])
    if own == size:
        return masks
    log.warning(
        "the mask is %d x %d, the image %d x %d: resized to the nearest pixel", *own[::-1], *size[::-1]
    )
    return F.interpolate(masks, size=size, mode="nearest-exact")


def expand_canvas(
    image: Image.Image, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """Return the image on a larger canvas, and the mask of what is new (white), for outpainting.

    >>> image, mask = expand_canvas(photo, right=32)
    >>> pipe(prompt, image=image, mask_image=mask).images[0]

    Args:
        image: any mode; the result is RGB, or RGBA where it has transparency.
        left, top, right, bottom: pixels to add. They repeat the image's edge, which the inpainting does not look at.

    Raises:
        UserError: a negative number.
    """
    if min(left, top, right, bottom) < 0:
        raise UserError(
            f"cannot add {left}, {top}, {right}, {bottom} pixels",
            "Give numbers of at least 0; crop with image.crop.",
        )
    width, height = image.width + left + right, image.height + top + bottom
    require_memory(f"a canvas of {width} x {height} pixels", 4 * width * height)
    image = upright(image)
    margins = ((top, bottom), (left, right))
    mask = np.pad(np.zeros((image.height, image.width), np.uint8), margins, constant_values=255)
    return Image.fromarray(np.pad(np.asarray(image), (*margins, (0, 0)), mode="edge")), Image.fromarray(mask)
