"""``LatentFlowInpaintPipeline``: a hole in an image filled, and every other pixel kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..autoencoder import latent_channels, latent_mask, masked_condition, masked_latents, masked_source
from ..errors import UserError, unknown
from ..flow import Velocity
from ..flow.inpainting import DEFAULT_INPAINTING, INPAINTING
from .arguments import checked
from .base import AfterStep, FlowPipeline, Generators, Sampler
from .call import RunningCall, StepCallback
from .conditioning import ClassLabels
from .images import Images, read_images, read_masks, transparent_again
from .windows import Painting, prepared

TRAINED = "trained"
#: Methods that a network which was trained with masks is told of the hole in: one steers it all the same.
TOLD = (TRAINED, "pnp-flow")
#: Fresh noise corrects what a network got wrong on the way, which in a large hole is much: docs/inpainting.md.
TRAINED_SOLVER = "ddpm"


class LatentFlowInpaintPipeline(FlowPipeline):
    """Fills the hole that a mask leaves in an image; what is not masked is the image's own, to the pixel.

    ``LatentFlowInpaintPipeline.from_pipe(pipe)`` shares the components of any other of our pipelines. The flow is
    steered towards what is known; a checkpoint that was trained with masks is told of it as well, and fills better.

    Outpainting: ``image, mask = latentflow.expand_canvas(image, right=32)`` makes the arguments.
    """

    @checked
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Images = None,
        mask_image: Images = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
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
        method: str | None = None,
        feather: float = 0,
    ) -> Any:
        """Fill holes. Arguments that are not listed here are those of ``LatentFlowPipeline``.

        Args:
            image: PIL image(s) of any mode, an array ((B,) H, W, 3) or a tensor ((B,) 3, H, W) in [0, 1]; of any
                size, which is also the result's.
            mask_image: white (1) where to repaint, black (0) where to keep; PIL, an array or a tensor as ``image``
                with one channel. Soft values blend what is drawn with the image; what is drawn fills the mask >= 0.5.
                One image or mask serves several of the other, and of prompts.
            masked_image_latents: latents (B, C, h, w) of the image with its hole hidden, instead of those that are
                made from ``image`` and ``mask_image``.
            height, width: resize the image to them first; with ``padding_mask_crop``, the size to draw at (default:
                as trained).
            padding_mask_crop: draw only the hole and so many pixels around it, enlarged to the size to draw at: for
                images much larger than those of the training.
            strength: in [0, 1]: the flow starts at t = 1 - strength from what is in the hole, mixed with noise. 1 draws
                from pure noise, 0 returns the image.
            num_inference_steps: of the whole way; about strength * num_inference_steps are taken. Default: 20,
                or 4 where average velocities are followed, which of all methods "trained" does alone.
            latents: the noise (B, C, h, w) to start from.
            output_type: as of ``LatentFlowPipeline``; "latent" are those of the part that was drawn, uncomposed.
            method: "trained", or a key of ``latentflow.flow.INPAINTING``; default:
                ``latentflow.flow.inpainting.DEFAULT_INPAINTING``, but "trained" where a checkpoint that is shall
                follow a solver or the pipeline's scheduler, or predicts average velocities. "trained" takes any of
                these, by itself 'ddpm', or average velocities; the others run on our own solvers. A checkpoint that was
                trained with masks is told of the hole by "trained" and "pnp-flow", the others tell it nothing.
                "repaint" goes back in time, which the timesteps that a callback is told do not show.
            feather: blend over so many pixels around the hole.

        Returns:
            ``ImagePipelineOutput`` with ``images``, or the tuple. Pixels where the (feathered) mask is 0 are the
            image's own, in sRGB. PIL images are RGBA where the image has transparency: what is kept keeps its
            alpha and the colours under it, what is painted is opaque. Arrays and tensors are RGB, on white.

        Raises:
            UserError: as ``LatentFlowPipeline``; also images, masks, a strength or a method that are none.
        """
        method = self._method(method, solver)
        # 1. Images, masks, and the window of each that is drawn
        painting = self._painting(image, mask_image, height, width, padding_mask_crop, feather)
        if painting.unchanged:
            strength = 0.0
        if masked_image_latents is not None:
            cells = (side // self.vae_scale_factor for side in painting.canvas)
            shape = (len(painting.images), self.transformer.config.in_channels, *cells)
            if tuple(masked_image_latents.shape) != shape:
                raise UserError(
                    f"masked_image_latents have shape {tuple(masked_image_latents.shape)}",
                    f"For these inputs it is {shape}.",
                )
        # 2. The condition, one row per image
        call = self.start_call(
            prompt=prompt,
            height=painting.canvas[0],
            width=painting.canvas[1],
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            class_labels=class_labels,
            guidance_interval=guidance_interval,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            generator=generator,
            latents=latents,
            images=len(painting.images),
        )
        # 3. The noise, what is known, and how to go from one to the other
        noise = self.prepare_noise(call.rows, *painting.canvas, generator, latents)
        device = self._execution_device
        seen, holes = painting.seen().to(device), painting.seen_holes().to(device)
        known, hole = self._known(method, seen, holes, masked_image_latents, call)
        velocity: Velocity = call.velocity
        after_step: AfterStep = call.after_step
        if call.channels is not None and self.config.coupling == "data-dependent":
            noise = masked_source(noise, known, hole)
            velocity, after_step = only_in(hole, known, velocity, after_step)
        if method == TRAINED and self.scheduler is None and not self.few_steps:
            solver = solver or TRAINED_SOLVER
        # 4. From noise to data; strength 1 is pure noise on every grid
        drawn = self.follow(
            velocity,
            noise,
            num_inference_steps,
            sigmas,
            solver,
            generator,
            after_step,
            strength=strength,
            x1=call.rows_of(self.encode_images(seen)) if strength < 1.0 else None,
            sampler=None if method == TRAINED else steered(INPAINTING[method], known, hole),
        )
        # 5. From latents to images in which only the hole is new
        if output_type == "latent":
            return self.finish_call(drawn, return_dict)
        if strength == 0.0:
            images = call.rows_of(painting.images)
        else:
            images = painting.finished((self.decode_latents(drawn) / 2.0 + 0.5).clamp(0.0, 1.0))
        result = self.output_images(images, output_type)
        if output_type == "pil":
            painted = painting.painted if strength > 0.0 else torch.zeros_like(painting.masks)
            result = transparent_again(result, image, painted)
        return self.finish_call(result, return_dict)

    def _method(self, name: str | None, solver: str | None) -> str:
        """The method that a call uses.

        Raises:
            UserError: there is none of this name, or this checkpoint cannot.
        """
        if name is None:
            follows = self.takes_masks and (
                self.few_steps or solver is not None or self.scheduler is not None
            )
            name = TRAINED if follows else DEFAULT_INPAINTING
        if name not in (TRAINED, *INPAINTING):
            raise unknown("inpainting method", name, [TRAINED, *INPAINTING])
        if name == TRAINED and not self.takes_masks:
            raise UserError(
                "this checkpoint was not trained with masks, which method 'trained' needs",
                f"Methods that steer any checkpoint: {', '.join(INPAINTING)}.",
            )
        return name

    def _painting(
        self,
        image: Images,
        mask_image: Images,
        height: int | None,
        width: int | None,
        padding_mask_crop: int | None,
        feather: float,
    ) -> Painting:
        """Images and masks, and what of them is drawn at which size."""
        if padding_mask_crop is None:
            images = read_images(image, height, width)
            canvas = (images.shape[2], images.shape[3])
        else:
            images, canvas = read_images(image), self.image_size(height, width, None)
        masks = read_masks(mask_image, (images.shape[2], images.shape[3]))
        return prepared(images, masks, feather, self._canvas(canvas), padding_mask_crop)

    def _known(
        self, method: str, seen: Tensor, holes: Tensor, given: Tensor | None, call: RunningCall
    ) -> tuple[Tensor, Tensor]:
        """Latents of what is kept (B, C, h, w) and the mask of the latents (B, 1, h, w); tells the network of both."""
        with self._steady_vae() as vae:
            channels = latent_channels(vae)
            if method in TOLD and self.takes_masks:
                told = masked_condition(vae, seen, holes)
                known = told[:, -channels:]
            else:
                told, known = None, masked_latents(vae, seen, holes)
        if given is not None:
            known = given.to(known)
        if told is not None:
            call.channels = call.rows_of(torch.cat([told[:, :-channels], known], 1))
        return call.rows_of(known), call.rows_of(latent_mask(holes, self.vae_scale_factor))


def only_in(
    hole: Tensor, known: Tensor, velocity: Velocity, after_step: AfterStep
) -> tuple[Velocity, AfterStep]:
    """A flow that moves in the hole only: whatever a solver does to the known latents, a noise of its own for one.

    In the hole it is an ordinary flow from noise, under the condition of what is known, so every solver is right.
    """

    def put(x: Tensor) -> Tensor:
        return torch.where(hole > 0, x, known.to(x))

    def moving(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(hole > 0, velocity(put(x), t), 0.0)

    return moving, lambda i, timestep, x: put(after_step(i, timestep, put(x)))


def steered(method: Callable[..., Tensor], known: Tensor, hole: Tensor) -> Sampler:
    """A function of ``INPAINTING`` as a sampler, which is called as ``integrate`` is."""

    def sampler(velocity: Velocity, x: Tensor, times: Tensor, **options: Any) -> Tensor:
        return method(velocity, x, known, hole, times, **options)

    return sampler
