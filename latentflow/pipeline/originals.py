"""The images that an edit starts from: pixels with or without a mask, or their latents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..autoencoder import latent_mask
from ..errors import UserError
from ..families.model import Size
from .calls import CallMixin
from .images import Images, padded, read_images, transparent_again
from .inpaint_batch import InpaintBatch, read_batch


@dataclass(frozen=True)
class Originals:
    """The images that a call brings.

    Attributes:
        values: (P, 3, *canvas) in [-1, 1], as the network sees them; or their latents (P, C, h, w).
        encoded: the values are latents.
        size: (height, width) of the images in pixels.
        canvas: (height, width) of what the latents cover.
        batch: the images with their masks, where there are masks.
    """

    values: Tensor
    encoded: bool
    size: Size
    canvas: Size
    batch: InpaintBatch | None = None

    def __len__(self) -> int:
        return len(self.values)

    def drawn_at(self, size: Size) -> Originals:
        """Return the images where all of each is drawn at a size (height, width), which without masks is the result's.

        Masks keep the pixels of the images at their own size.
        """
        if self.batch is None:
            return replace(self, size=size, canvas=size)
        batch = self.batch.drawn_at(size)
        return replace(self, values=batch.network_view(), canvas=size, batch=batch)

    def latents(self, pipe: CallMixin) -> Tensor:
        """Return their latents (P, C, h, w) float32."""
        if self.encoded:  # as of given noise: checked, on the device, in float32
            return pipe.prepare_noise(len(self), *self.canvas, None, self.values)
        return pipe.encode_images(self.values)

    def latent_masks(self, pipe: CallMixin) -> Tensor | None:
        """Return where the latents are edited, (P, 1, h, w) in {0, 1}; None: everywhere."""
        return None if self.batch is None else latent_mask(self.batch.network_holes(), pipe.vae_scale_factor)

    def to_images(self, pipe: CallMixin, x1: Tensor, output_type: str, image: Images) -> Any:
        """Return what latents (B, C, h, w) make of the images, of their size; masks keep the pixels of ``image``."""
        if self.batch is None or output_type == "latent":
            return pipe.to_images(x1, output_type, self.size)
        result = pipe.to_output(
            self.batch.paste_back((pipe.decode_latents(x1) / 2.0 + 0.5).clamp(0.0, 1.0)), output_type
        )
        return transparent_again(result, image, self.batch.painted) if output_type == "pil" else result


def read_originals(
    pipe: CallMixin, image: Images, latents: Tensor | None, height: int | None, width: int | None
) -> Originals:
    """Return the images of a call, or what their latents cover.

    Raises:
        UserError: both or neither are given; no images, or latents of another shape than the network's.
    """
    if latents is None:
        images = read_images(image, height, width)
        size = images.shape[2], images.shape[3]
        canvas = pipe.canvas_size(size)
        return Originals(2.0 * padded(images, canvas) - 1.0, False, size, canvas)
    if image is not None:
        raise UserError("image and latents are both given", "Pass one: the latents are those of images.")
    canvas = pipe.image_size(None, None, latents)
    shape = pipe.model.latent_shape(*canvas)
    if latents.shape[1:] != shape:
        raise UserError(
            f"latents have shape {tuple(latents.shape)}", f"The network takes (B, {shape[0]}, h, w)."
        )
    size = height or canvas[0], width or canvas[1]
    if pipe.canvas_size(size) != canvas:
        raise UserError(
            f"latents cover {canvas[1]} x {canvas[0]} pixels, height and width are {size[0]} and {size[1]}",
            "Leave height and width out, or pass those of the images before they were encoded.",
        )
    return Originals(latents, True, size, canvas)


def read_masked_originals(
    pipe: CallMixin,
    image: Images,
    latents: Tensor | None,
    height: int | None,
    width: int | None,
    mask_image: Images,
    padding_mask_crop: int | None,
    feather: float,
    seamless: bool,
) -> Originals:
    """Return the images of a call with their masks; without a mask as `read_originals`.

    Raises:
        UserError: see `read_originals`; settings of a mask without one; latents with one.
    """
    if mask_image is None:
        if padding_mask_crop is not None or feather > 0.0:
            name = "feather" if padding_mask_crop is None else "padding_mask_crop"
            raise UserError(f"{name} is given without a mask_image", "Pass the mask too, or leave it out.")
        return read_originals(pipe, image, latents, height, width)
    if latents is not None:
        raise UserError(
            "latents are given with a mask_image", "Pass the image: what the mask keeps are its own pixels."
        )
    batch = read_batch(pipe, image, mask_image, height, width, padding_mask_crop, feather, seamless)
    size = batch.images.shape[2], batch.images.shape[3]
    return Originals(batch.network_view(), False, size, batch.canvas, batch)
