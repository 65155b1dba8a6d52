"""``LatentFlowImg2ImgPipeline``: draw an image anew, from as far back towards noise as ``strength`` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor

from ..families.model import Generators, Rows
from .adapter_scale import AdapterScale
from .arguments import ClassLabels, ConditionArguments, StepCallback, checked
from .base import FlowPipeline
from .calls import CallMixin
from .images import Images, padded, read_images


class ImageToImageCall(CallMixin):
    """The call of ``LatentFlowImg2ImgPipeline``, whatever flow model it calls."""

    @checked
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Images = None,
        strength: float = 0.6,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | Rows | None = None,
        negative_prompt_embeds: Tensor | Rows | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        max_sequence_length: int | None = None,
        class_labels: ClassLabels | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        solver: str | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        control_image: Images = None,
        control_scale: float | Mapping[str, float] = 1.0,
        temperature: float = 1.0,
        corrector: float = 0.0,
        **adapters: Unpack[AdapterScale],
    ) -> Any:
        """Draw images anew. Arguments that are not listed here are those of ``LatentFlowPipeline``.

        Args:
            image: PIL image(s) of any mode, an array ((B,) H, W, 3) or a tensor ((B,) 3, H, W) in [0, 1]; of any
                size, which is also the result's. One with several prompts, or several with one prompt, will do.
            strength: in [0, 1]: the flow starts at t = 1 - strength. 0 is the image through the autoencoder, 1 is
                drawn from pure noise.
            num_inference_steps: of the whole way; about strength * num_inference_steps are taken. Default: 20,
                or 4 of a checkpoint of average velocities, 16 of tokens.
            latents: the noise (B, C, h, w) to mix in.
            height, width: resize the image to them first. Networks draw best near the size that they were
                trained at.

        Returns:
            ``ImagePipelineOutput`` with ``images``, or the tuple; with output_type "latent" their latents, which
            cover the image padded to the right and below.

        Raises:
            UserError: as ``LatentFlowPipeline``; also an image or a strength that is none.
        """
        originals = read_images(image, height, width)
        size = (originals.shape[2], originals.shape[3])
        canvas = self.canvas_size(size)
        # 1. The condition, one row per image
        call = self.start_call(ConditionArguments.of(locals()), *canvas, images=len(originals))
        # 2. The image's latents and the noise
        data = call.expand(
            self.encode_images(2.0 * padded(originals, canvas).to(self._execution_device) - 1.0)
        )
        if strength < 1.0:
            call.rows = self.model.with_latent_variable(call.rows, like=data, mean=True)
        noise = self.prepare_noise(len(call.rows), *canvas, generator, latents)
        # 3. From between the two to data; strength 1 is pure noise on every grid
        drawn = self.sample(
            call.velocity,
            noise,
            num_inference_steps,
            sigmas,
            solver,
            generator,
            call.after_step,
            strength=strength,
            x1=data if strength < 1.0 else None,
        )
        # 4. From latents to images of the image's size
        return self.finish_call(self.to_images(drawn, output_type, size), return_dict)


class LatentFlowImg2ImgPipeline(ImageToImageCall, FlowPipeline):
    """Draw an image anew: noise is mixed into its latents, which then follow the flow to data.

    ``LatentFlowImg2ImgPipeline.from_pipe(pipe)`` shares the components of any other of our pipelines.

    Variations of one image: ``pipe(prompt, image=image, generator=[...], num_images_per_prompt=4)``, a generator
    for each; image b depends on generator b alone, up to rounding (one level of 255).
    """

    call = ImageToImageCall
