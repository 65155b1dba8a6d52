"""Families whose network takes an image in extra input channels, beside its latent: with a mask, or as control."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .pretrained import PretrainedModel
from .rows import Rows, check_counts, keep


class ControlModel(PretrainedModel):
    """Family whose network draws under an image of the same size: edges, depth, poses. Its rows keep its latents."""

    extra = ("control",)
    image_input = "control"
    learns_with_images = False  # in general: InstructPix2Pix takes latents of another scale

    def describe_condition(self) -> str:
        """Return what the checkpoint takes, as the second half of an error."""
        return (
            "It takes a prompt and a control image: latentflow generate --control FILE, in Python "
            "LatentFlowPipeline with control_image."
        )

    def with_control(self, rows: Rows, images: Tensor) -> Rows:
        """See `Rows.with_control`.

        Raises:
            UserError: numbers of images and rows that do not fit.
        """
        check_counts(rows, images)
        return keep(rows, control=self.control_latents(images.to(self.device)))

    def control_latents(self, images: Tensor) -> Tensor:
        """Images (P, 3, H, W) in [-1, 1] -> the network's further channels (P, C', h, w)."""
        return self.encode(images)


class MaskedModel(PretrainedModel):
    """Family whose network fills the hole of an image: its rows keep the latents of the rest, and the mask.

    A network of the family that takes neither has no ``extra``.
    """

    learns_with_images = True

    def __init__(self, pipeline: Any, **options: Any) -> None:
        super().__init__(pipeline, **options)
        if self.takes_masks:
            self.image_input = "mask"

    @property
    def takes_masks(self) -> bool:
        """True for a network that was trained to inpaint."""
        return "mask" in self.extra

    def describe_condition(self) -> str:
        """Return what the checkpoint takes, as the second half of an error."""
        if not self.takes_masks:
            return super().describe_condition()
        return "It takes a prompt, an image and its mask: latentflow inpaint, in Python LatentFlowInpaintPipeline."

    def with_known(self, rows: Rows, images: Tensor, masks: Tensor, known: Tensor | None = None) -> Rows:
        """See `Rows.with_known`.

        Args:
            known: latents (P, C, h, w) of the images with their holes hidden; default: made from them.

        Raises:
            UserError: the network was not trained to inpaint; numbers or sizes that do not fit.
        """
        if not self.takes_masks:
            return super().with_known(rows, images, masks, known)
        holes = checked_holes(rows, images, masks).to(self.device)
        return self.with_masked(rows, self.mask_condition(images.to(self.device), holes, known))

    def mask_condition(self, images: Tensor, masks: Tensor, known: Tensor | None = None) -> Tensor:
        """Return what the network takes of masked images (P, C + C', h, w): the latents, and `mask_channels`.

        Args:
            images: (P, 3, H, W) in [-1, 1].
            masks: (P, 1, H, W) in {0, 1}, 1 = repaint.
            known: as of `with_known`.
        """
        holes = masks.float()
        if known is None:
            with torch.autocast(images.device.type, enabled=False):  # autoencoders may overflow in float16
                known = self.encode(images * (1.0 - holes))
        known = known.to(holes)
        return torch.cat([known, self.mask_channels(holes, known)], 1)

    def with_masked(self, rows: Rows, channels: Tensor) -> Rows:
        """See `PretrainedModel.with_masked`."""
        count = self.latent_shape(self.size_multiple, self.size_multiple)[0]
        return keep(rows, known=channels[:, :count], mask=channels[:, count:])

    def known_latents(self, rows: Rows) -> Tensor:
        """Return the latents (B, C, h, w) of the images that `with_known` has added, their holes hidden."""
        known = rows.kept.get("known")
        return known if isinstance(known, Tensor) else super().known_latents(rows)

    def mask_channels(self, masks: Tensor, known: Tensor) -> Tensor:
        """Masks (P, 1, H, W) in {0, 1}, 1 = repaint -> the network's further channels (P, C', h, w).

        Args:
            known: (P, C, h, w), which the pipelines' own functions take as well.
        """
        raise NotImplementedError


def checked_holes(rows: Rows, images: Tensor, masks: Tensor) -> Tensor:
    """Return masks (P, 1, H, W) as holes in {0, 1}.

    Raises:
        UserError: numbers or sizes of rows, images and masks that do not fit.
    """
    check_counts(rows, images)
    if masks.shape != (len(images), 1, *images.shape[2:]):
        raise UserError(
            f"masks have shape {tuple(masks.shape)}, images {tuple(images.shape)}",
            "Give a mask (P, 1, H, W) for each image, of the same size.",
        )
    return (masks >= 0.5).float()
