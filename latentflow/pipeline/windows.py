"""Images with holes: the window of each that a network sees, and the way back into the image."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from ..errors import UserError
from .call import Size
from .images import resized

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """The part of an image that the network sees, and its size there; to its right and below is padding.

    Attributes:
        left, top, right, bottom: in the image's pixels.
        size: (height, width) on the canvas.
    """

    left: int
    top: int
    right: int
    bottom: int
    size: Size


def whole(size: Size) -> Window:
    """All of an image, at its own size."""
    return Window(0, 0, size[1], size[0], size)


def around(mask: Tensor, margin: int, canvas: Size) -> Window:
    """The hole of a mask (1, H, W) with ``margin`` pixels around it, widened to the canvas's shape where there is room.

    diffusers' ``padding_mask_crop``; what cannot be widened keeps its proportions, and the canvas is padded.
    """
    hole = Image.fromarray((mask[0] >= 0.5).numpy())
    if not hole.getbbox():
        left, top, right, bottom = 0, 0, hole.width, hole.height
    else:
        left, top, right, bottom = VaeImageProcessor.get_crop_region(hole, canvas[1], canvas[0], pad=margin)
    scale = min(canvas[0] / (bottom - top), canvas[1] / (right - left))
    height, width = (max(1, round(scale * side)) for side in (bottom - top, right - left))
    return Window(left, top, right, bottom, (min(height, canvas[0]), min(width, canvas[1])))


def seen_images(images: Tensor, windows: Sequence[Window], canvas: Size) -> Tensor:
    """(N, C, *canvas): each image through its window; padding repeats the last row and column."""
    views = [resized(_cut(row, window), window.size) for row, window in zip(images, windows, strict=True)]
    return torch.cat([_padded(view, canvas) for view in views])


def seen_masks(holes: Tensor, windows: Sequence[Window], canvas: Size) -> Tensor:
    """As ``seen_images``, for masks in {0, 1}: a pixel of the canvas is repainted if any pixel that it covers is.

    Padding repeats the mask too: beside a hole it is hole, since what it repeats of the image lies in the hole.
    """
    views = [
        F.adaptive_max_pool2d(_cut(row, window), window.size)
        for row, window in zip(holes, windows, strict=True)
    ]
    return torch.cat([_padded(view, canvas) for view in views])


def put_back(drawn: Tensor, images: Tensor, windows: Sequence[Window]) -> Tensor:
    """(N, 3, H, W): the images with what was drawn (N, 3, *canvas) in their windows."""
    result = images.clone()
    for row, view, window in zip(result, drawn, windows, strict=True):
        size = (window.bottom - window.top, window.right - window.left)
        inside = view[None, :, : window.size[0], : window.size[1]]
        row[:, window.top : window.bottom, window.left : window.right] = resized(inside, size)[0]
    return result


def _cut(row: Tensor, window: Window) -> Tensor:
    return row[None, :, window.top : window.bottom, window.left : window.right]


def _padded(view: Tensor, canvas: Size) -> Tensor:
    missing = (canvas[1] - view.shape[-1], canvas[0] - view.shape[-2])
    return F.pad(view, (0, missing[0], 0, missing[1]), mode="replicate") if any(missing) else view


@dataclass(frozen=True)
class Painting:
    """The images of a call, with holes to be painted.

    Attributes:
        images: (P, 3, H, W) in [0, 1].
        masks: (P, 1, H, W) in [0, 1]; 1 = repaint.
        windows: of each image.
        canvas: (height, width) of what the network draws.
        feather: pixels around the hole over which to blend.
    """

    images: Tensor
    masks: Tensor
    windows: Sequence[Window]
    canvas: Size
    feather: float = 0.0

    @property
    def holes(self) -> Tensor:
        """(P, 1, H, W) in {0, 1}: what is drawn anew."""
        return (self.masks >= 0.5).to(self.masks)

    @property
    def painted(self) -> Tensor:
        """(P, 1, H, W) in [0, 1]: the share of every pixel that is drawn anew."""
        return feathered(self.masks, self.feather)

    @property
    def unchanged(self) -> bool:
        """Whether there is no hole in any of them."""
        return not bool(self.holes.any())

    def seen(self) -> Tensor:
        """(P, 3, *canvas) in [-1, 1]."""
        return 2.0 * seen_images(self.images, self.windows, self.canvas) - 1.0

    def seen_holes(self) -> Tensor:
        """(P, 1, *canvas) in {0, 1}."""
        return seen_masks(self.holes, self.windows, self.canvas)

    def finished(self, drawn: Tensor) -> Tensor:
        """The images (B, 3, H, W) in [0, 1] with their holes filled from ``drawn`` (B, 3, *canvas) in [0, 1].

        Row b belongs to image b * P // B. What lies outside of the (feathered) mask is the image's own.
        """
        each = len(drawn) // len(self.images)
        images = self.images.repeat_interleave(each, 0)
        windows = [window for window in self.windows for _ in range(each)]
        placed = put_back(drawn.cpu(), images, windows)
        masks = self.painted.repeat_interleave(each, 0)
        return composite(masks, placed, images).to(drawn.device)


def prepared(
    images: Tensor,
    masks: Tensor,
    feather: float,
    canvas: Size,
    margin: int | None,
) -> Painting:
    """One image or mask serves several of the other; each is seen whole, or ``margin`` pixels around its hole.

    Raises:
        UserError: numbers of images and masks that do not fit; a negative margin or feather.
    """
    for name, value in (("feather", feather), ("padding_mask_crop", margin or 0)):
        if value < 0:
            raise UserError(f"{name} is {value}", "Give a number of pixels, at least 0.")
    count = max(len(images), len(masks))
    if {len(images), len(masks)} - {1, count}:
        raise UserError(
            f"{len(masks)} masks for {len(images)} images", "Pass as many of each, or one of either."
        )
    images, masks = images.expand(count, -1, -1, -1), masks.expand(count, -1, -1, -1)
    hollow = (masks >= 0.5).flatten(1).any(1)
    if not hollow.all():
        rows = [] if count == 1 else (~hollow).nonzero()[:, 0].tolist()
        which = f" of image {', '.join(map(str, rows))}" if rows else ""
        log.warning("the mask%s keeps every pixel (none reaches 0.5): the image comes back as it is", which)
        masks = masks * hollow[:, None, None, None]  # nothing is drawn that a soft value could blend in
    size = (images.shape[2], images.shape[3])
    if margin is None:
        windows = [whole(size)] * count
    else:
        windows = [around(mask, max(margin, math.ceil(feather)), canvas) for mask in masks]
    return Painting(images, masks, windows, canvas, feather)


def feathered(masks: Tensor, feather: float) -> Tensor:
    """Soft masks (N, 1, H, W) that also fall from 1 to 0 over ``feather`` pixels around the hole.

    A pixel at distance d from the hole (mask >= 0.5) gets at least 1 - d / (feather + 1): farther than ``feather``
    nothing changes, and within the hole nothing of the image shines through.
    """
    if feather == 0:
        return masks
    distance = np.stack([distance_transform_edt(row) for row in (masks[:, 0] < 0.5).numpy()])
    # Without any hole the transform has nothing to measure from.
    levels = np.where(distance <= feather, 1.0 - distance / (feather + 1.0), 0.0)
    ramp = torch.from_numpy(levels).to(masks)[:, None]
    some = (masks >= 0.5).flatten(1).any(1)[:, None, None, None]
    return torch.where(some, torch.maximum(masks, ramp), masks)


def composite(masks: Tensor, drawn: Tensor, images: Tensor) -> Tensor:
    """masks * drawn + (1 - masks) * images; where the mask is 0 the image, to the last bit, whatever was drawn."""
    blended = masks * drawn + (1.0 - masks) * images
    return torch.where(masks == 0.0, images, torch.where(masks == 1.0, drawn, blended))
