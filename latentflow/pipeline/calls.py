"""Images and latents in a pipeline's call, whatever flow model it calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ..autoencoder import decoded_by, latent_channels
from ..errors import UserError
from ..families.model import Generators, Size
from ..families.sizes import fit_size
from .arguments import check_noise, checked
from .sampling import SamplingMixin

if TYPE_CHECKING:
    from .images import Images


def from_model(name: str) -> Any:
    """Return a property that asks the pipeline's flow model for its attribute ``name``."""
    return property(lambda pipe: getattr(pipe.model, name))


class CallMixin(SamplingMixin):
    """Common part of the pipelines' calls: noise, sizes, images from latents; see `SamplingMixin` for the rest."""

    image_processor: Any
    vae: Any
    text_encoder: Any
    takes_text = from_model("takes_text")
    takes_classes = from_model("takes_classes")
    takes_masks = from_model("takes_masks")
    labels = from_model("labels")
    path = from_model("path")
    few_steps = from_model("few_steps")
    usual_guidance = from_model("usual_guidance")

    @checked
    def prepare_noise(
        self,
        count: int,
        height: int,
        width: int,
        generator: Generators | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Return the noise (B, C, h, w) of ``count`` images, float32, or ``latents``; of tokens (B, h, w) int64.

        Raises:
            UserError: see `check_noise`.
        """
        check_noise(self.model, count, height, width, generator, latents)
        if latents is not None:
            kind = torch.int64 if self.model.draws_tokens else torch.float32
            return latents.to(self._execution_device, kind)
        return self.model.noise(count, height, width, generator)

    def image_size(
        self,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        control_image: Images = None,
    ) -> Size:
        """Return height and width in pixels: as asked for, else of the given latents, else of a control image by which
        the model goes, else as in training.

        Raises:
            UserError: none of these is known; control images of several sizes.
        """
        native = self.model.native_size
        if latents is not None:
            native = latents.shape[-2] * self.vae_scale_factor, latents.shape[-1] * self.vae_scale_factor
        elif control_image is not None and self.model.sized_by_control and (height is None or width is None):
            from .control import by_kind  # which imports the readers of data
            from .images import read_images

            given = by_kind(control_image)
            image = given.get("image") if isinstance(given, dict) else given
            rows, columns = read_images(image, name="control_image").shape[2:]
            unit = self.model.size_multiple
            if height or width:
                return fit_size((rows, columns), height, width, unit)
            return max(rows // unit, 1) * unit, max(columns // unit, 1) * unit
        if native is None:
            if height is None or width is None:
                raise UserError("this checkpoint does not say its size", "Pass height and width.")
            return height, width
        return native[0] if height is None else height, native[1] if width is None else width

    def canvas_size(self, size: Size) -> Size:
        """Return ``size`` in pixels, rounded up to what the autoencoder and the network's patches divide."""
        unit = self.model.size_multiple
        return -(-size[0] // unit) * unit, -(-size[1] // unit) * unit

    @checked
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], on any device and of any floating-point type -> latents; see
        `FlowModel.encode`.

        Raises:
            UserError: of another shape; sides that are no multiples of the autoencoder's factor.
        """
        height, width = images.shape[2:]
        if images.shape[1] != 3 or height % self.vae_scale_factor or width % self.vae_scale_factor:
            raise UserError(
                f"images have shape {tuple(images.shape)}",
                f"Pass (B, 3, H, W), where {self.vae_scale_factor} divides H and W.",
            )
        return self.model.encode(images.to(self._execution_device))

    @checked
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w), on any device and of any floating-point type -> images (B, 3, H, W); see
        `FlowModel.decode`.

        Raises:
            UserError: of another shape.
        """
        tokens = self.model.draws_tokens
        channels = None if self.vae is None or tokens else latent_channels(self.vae)
        if channels is not None and (latents.ndim != 4 or latents.shape[1] != channels):
            what = "latents" if latents.is_floating_point() else "latents that are tokens"
            raise UserError(
                f"{what} have shape {tuple(latents.shape)}", f"The autoencoder takes (B, {channels}, h, w)."
            )
        return self.model.decode(latents.to(self._execution_device))

    @checked
    def to_images(
        self, latents: Tensor, output_type: str = "pil", size: Size | None = None, vae: Any = None
    ) -> Any:
        """Return latents as a caller wants to have them: "pil", "np", "pt" or "latent"; images cropped to ``size``.

        In a callback that asks for "prediction", ``pipe.to_images(tensors["prediction"])`` is a preview: the images
        that the flow is heading for. With ``vae=load_autoencoder("madebyollin/taef1")``, a tiny autoencoder, it costs
        next to nothing.

        Args:
            vae: decode with this autoencoder in the place of the pipeline's own.

        Raises:
            UserError: see `decode_latents`; an output type that is none; an autoencoder of other latents.
        """
        if output_type == "latent":
            return latents
        with decoded_by(self.vae, vae):
            images = (self.decode_latents(latents) / 2.0 + 0.5).clamp(0.0, 1.0)
        height, width = size or images.shape[2:]
        return self.to_output(images[:, :, :height, :width], output_type)

    def to_output(self, images: Tensor, output_type: str) -> Any:
        """Return images (B, 3, H, W) in [0, 1] as a caller wants to have them: "pil", "np" or "pt"."""
        return self.image_processor.postprocess(images, output_type, do_denormalize=[False] * len(images))

    def finish_call(self, images: Any, return_dict: bool) -> Any:
        """Return what a call returns."""
        return ImagePipelineOutput(images=images) if return_dict else (images,)
