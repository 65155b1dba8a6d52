"""Images with holes: the window of each that a network sees, and what was drawn pasted back into the hole alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..families.model import Size
from .calls import CallMixin
from .control import Controls, check_number
from .images import Images, padded, read_images, read_masks, resized
from .seam import match_border

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

    def cut(self, image: Tensor) -> Tensor:
        """Return the window of an image (C, H, W) as a batch of one."""
        return image[None, :, self.top : self.bottom, self.left : self.right]


def crop_around_mask(mask: Tensor, margin: int, canvas: Size) -> Window:
    """Return the hole of a mask (1, H, W) and ``margin`` pixels around it, widened to the canvas's shape where there is
    room.

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


@dataclass(frozen=True)
class InpaintBatch:
    """The images of a call, with holes to be filled.

    Attributes:
        images: (P, 3, H, W) in [0, 1].
        masks: (P, 1, H, W) in [0, 1]; 1 = repaint.
        windows: of each image.
        canvas: (height, width) of what the network draws.
        feather: pixels around the hole over which to blend.
        match_depth: pixels of the canvas over which colours are matched within the hole; None: not at all.
    """

    images: Tensor
    masks: Tensor
    windows: Sequence[Window]
    canvas: Size
    feather: float = 0.0
    match_depth: float | None = None

    @property
    def holes(self) -> Tensor:
        """(P, 1, H, W) in {0, 1}: the pixels that are drawn anew."""
        return (self.masks >= 0.5).to(self.masks)

    @property
    def painted(self) -> Tensor:
        """(P, 1, H, W) in [0, 1]: the share of every pixel that is drawn anew."""
        return feathered(self.masks, self.feather)

    @property
    def unchanged(self) -> bool:
        """True if there is no hole in any of them."""
        return not bool(self.holes.any())

    def drawn_at(self, size: Size) -> InpaintBatch:
        """Return the batch with all of each image drawn at a size (height, width), and resized where it is pasted."""
        return replace(self, canvas=size, windows=[replace(window, size=size) for window in self.windows])

    def network_view(self) -> Tensor:
        """Return (P, 3, *canvas) in [-1, 1], each image through its window; padding repeats the last row and column."""
        views = [
            resized(window.cut(image), window.size)
            for image, window in zip(self.images, self.windows, strict=True)
        ]
        return 2.0 * torch.cat([padded(view, self.canvas) for view in views]) - 1.0

    def network_holes(self) -> Tensor:
        """Return (P, 1, *canvas) in {0, 1}: a pixel is repainted if any pixel of the image that it covers is.

        Padding repeats the mask too: beside a hole it is hole, since what it repeats of the image lies in the hole.
        """
        views = [
            F.adaptive_max_pool2d(window.cut(hole), window.size)
            for hole, window in zip(self.holes, self.windows, strict=True)
        ]
        return torch.cat([padded(view, self.canvas) for view in views])

    def network_controls(self, controls: Controls) -> Controls:
        """Return control images of the size of the images as the network sees them, each through its image's window.

        Raises:
            UserError: there are others than one, or one for each image.
        """
        count, seen = len(self.images), {}
        for kind, values in controls.items():
            check_number(len(values), count)
            views = []
            for value, window in zip(values.expand(count, *values.shape[1:]), self.windows, strict=True):
                if kind == "labels":
                    part = F.interpolate(window.cut(value[None].double()), window.size, mode="nearest-exact")
                    views.append(padded(part, self.canvas)[:, 0].long())
                else:
                    views.append(padded(resized(window.cut(value), window.size), self.canvas))
            seen[kind] = torch.cat(views)
        return seen

    def paste_back(self, drawn: Tensor) -> Tensor:
        """Return the images (B, 3, H, W) in [0, 1] with their holes filled from ``drawn`` (B, 3, *canvas) in [0, 1].

        Row b belongs to image b * P // B. What lies outside of the (feathered) mask is the image's own.
        """
        each = len(drawn) // len(self.images)
        images = self.images.repeat_interleave(each, 0)
        masks = self.painted.repeat_interleave(each, 0)
        placed = images.clone()
        for row, (image, mask, view) in enumerate(zip(placed, masks, drawn.cpu(), strict=True)):
            window = self.windows[row // each]
            part = window.cut(image)
            inside = resized(
                view[None, :, : window.size[0], : window.size[1]], (part.shape[2], part.shape[3])
            )
            if self.match_depth is not None:
                scale = max(part.shape[2] / window.size[0], part.shape[3] / window.size[1])
                inside = match_border(inside, part, window.cut(mask) > 0, self.match_depth * scale)
            part.copy_(inside)
        return composite(masks, placed, images).to(drawn.device)


def feathered(masks: Tensor, feather: float) -> Tensor:
    """Return soft masks (N, 1, H, W) that also fall from 1 to 0 over ``feather`` pixels around the hole.

    A pixel at distance d from the hole (mask >= 0.5) gets at least 1 - d / (feather + 1): farther than ``feather``
    nothing changes, and within the hole nothing of the image shines through.
    """
    if feather == 0:
        return masks
    from scipy.ndimage import distance_transform_edt  # slow to import

    distance = np.stack([distance_transform_edt(row) for row in (masks[:, 0] < 0.5).numpy()])
    # Without any hole the transform has nothing to measure from.
    levels = np.where(distance <= feather, 1.0 - distance / (feather + 1.0), 0.0)
    ramp = torch.from_numpy(levels).to(masks)[:, None]
    some = (masks >= 0.5).flatten(1).any(1)[:, None, None, None]
    return torch.where(some, torch.maximum(masks, ramp), masks)


def composite(masks: Tensor, drawn: Tensor, images: Tensor) -> Tensor:
    """Return masks * drawn + (1 - masks) * images; where the mask is 0 the image, to the last bit, whatever was
    drawn."""
    blended = masks * drawn + (1.0 - masks) * images
    return torch.where(masks == 0.0, images, torch.where(masks == 1.0, drawn, blended))


def read_batch(
    pipe: CallMixin,
    image: Images,
    mask_image: Images,
    height: int | None,
    width: int | None,
    margin: int | None,
    feather: float,
    seamless: bool,
) -> InpaintBatch:
    """Return images and masks of a call, and the window of each that is drawn, with its size.

    One image or mask serves several of the other; each is seen whole, or ``margin`` pixels around its hole.

    Raises:
        UserError: numbers of images and masks that do not fit.
    """
    images = read_images(image, height, width) if margin is None else read_images(image)
    size = (images.shape[2], images.shape[3])
    canvas = pipe.canvas_size(size if margin is None else pipe.image_size(height, width, None))
    masks = read_masks(mask_image, size)
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
    whole = Window(0, 0, size[1], size[0], size)
    windows = [whole] * count
    if margin is not None:
        windows = [crop_around_mask(mask, max(margin, math.ceil(feather)), canvas) for mask in masks]
    # Half a cell of the latent grid: the scale of the autoencoder's errors.
    depth = pipe.vae_scale_factor / 2.0 if seamless else None
    return InpaintBatch(images, masks, windows, canvas, feather, depth)
