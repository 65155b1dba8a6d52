"""``LatentFlowInpaintPipeline``: fill a hole in an image, and keep every other pixel."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from ..autoencoder import latent_mask, masked_latents, masked_source
from ..errors import UserError, unknown
from ..families.model import Generators, Size
from ..flow import Velocity
from ..flow.inpainting import DEFAULT_INPAINTING, INPAINTING
from .arguments import ClassLabels, ConditionArguments, StepCallback, checked
from .base import FlowPipeline
from .images import Images, padded, read_images, read_masks, resized, transparent_again
from .sampling import AfterStep, BindVelocity, RunningCall, Sampler
from .seam import match_border

log = logging.getLogger(__name__)

TRAINED = "trained"
#: methods that see the hole as a condition where the network was trained with masks: "pnp-flow" steers it all the same
CONDITIONED = (TRAINED, "pnp-flow")
#: Fresh noise corrects what a network got wrong on the way, which in a large hole is much:
#: docs/measurements/inpainting.md.
TRAINED_SOLVER = "ddpm"


class LatentFlowInpaintPipeline(FlowPipeline):
    """Fill the hole that a mask leaves in an image; what is not masked is the image's own, to the pixel.

    ``LatentFlowInpaintPipeline.from_pipe(pipe)`` shares the components of any other of our pipelines. The flow is
    steered towards what is known; a checkpoint that was trained with masks has it as a condition too, and fills better.

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
        seamless: bool = True,
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
                or 4 of a checkpoint of average velocities, which method "trained" alone takes.
            latents: the noise (B, C, h, w) to start from.
            output_type: as of ``LatentFlowPipeline``; "latent" are those of the part that was drawn, uncomposed.
            method: "trained", or a key of ``latentflow.flow.INPAINTING``; default:
                ``latentflow.flow.inpainting.DEFAULT_INPAINTING``, but "trained" where a checkpoint was trained with
                masks and a solver or a scheduler is given, or it predicts average velocities. "trained" takes any of
                these, by itself 'ddpm', or average velocities; the others run on our own solvers. "trained" and
                "pnp-flow" give a checkpoint that was trained with masks the hole as a condition, the others do not.
                "repaint" goes back in time, which the timesteps that a callback gets do not show.
            feather: blend over so many pixels around the hole, which are then no longer the image's own.
            seamless: shift the colours of what is drawn to meet those around the hole (``match_border``). False:
                leave it as it is drawn.

        Returns:
            ``ImagePipelineOutput`` with ``images``, or the tuple. Pixels where the (feathered) mask is 0 are the
            image's own, in sRGB. PIL images are RGBA where the image has transparency: what is kept keeps its
            alpha and the colours under it, what is painted is opaque. Arrays and tensors are RGB, on white.

        Raises:
            UserError: as ``LatentFlowPipeline``; also images, masks, a strength or a method that are none.
        """
        method = self._method(method, solver)
        # 1. Images, masks, and the window of each that is drawn
        batch = self._read_batch(image, mask_image, height, width, padding_mask_crop, feather, seamless)
        if batch.unchanged:
            strength = 0.0
        shape = (len(batch.images), *self.model.latent_shape(*batch.canvas))
        if masked_image_latents is not None and tuple(masked_image_latents.shape) != shape:
            raise UserError(
                f"masked_image_latents have shape {tuple(masked_image_latents.shape)}",
                f"For these inputs it is {shape}.",
            )
        # 2. The condition, one row per image
        call = self.start_call(ConditionArguments.of(locals()), *batch.canvas, images=len(batch.images))
        # 3. The noise, what is known, and how to go from one to the other
        noise = self.prepare_noise(len(call.rows), *batch.canvas, generator, latents)
        device = self._execution_device
        views, holes = batch.network_view().to(device), batch.network_holes().to(device)
        known = self._add_known(method, views, holes, masked_image_latents, call)
        hole = call.expand(latent_mask(holes, self.vae_scale_factor))
        velocity: BindVelocity = call.velocity
        after_step: AfterStep = call.after_step
        if method in CONDITIONED and self.takes_masks and self.model.coupling == "data-dependent":
            noise = masked_source(noise, known, hole)
            velocity, after_step = only_in(hole, known, velocity, after_step)
        if method == TRAINED and self.scheduler is None and not self.few_steps:
            solver = solver or TRAINED_SOLVER
        # 4. From noise to data; strength 1 is pure noise on every grid
        drawn = self.sample(
            velocity,
            noise,
            num_inference_steps,
            sigmas,
            solver,
            generator,
            after_step,
            strength=strength,
            x1=call.expand(self.encode_images(views)) if strength < 1.0 else None,
            sampler=None if method == TRAINED else steered(INPAINTING[method], known, hole),
        )
        # 5. From latents to images in which only the hole is new
        if output_type == "latent":
            return self.finish_call(drawn, return_dict)
        if strength == 0.0:
            images = call.expand(batch.images)
        else:
            images = batch.paste_back((self.decode_latents(drawn) / 2.0 + 0.5).clamp(0.0, 1.0))
        result = self.to_output(images, output_type)
        if output_type == "pil":
            painted = batch.painted if strength > 0.0 else torch.zeros_like(batch.masks)
            result = transparent_again(result, image, painted)
        return self.finish_call(result, return_dict)

    def _method(self, name: str | None, solver: str | None) -> str:
        """Return the method that a call uses.

        Raises:
            UserError: there is none of this name, or this checkpoint cannot.
        """
        if name is None:
            chosen = bool(self.few_steps) or solver is not None or self.scheduler is not None
            name = TRAINED if self.takes_masks and chosen else DEFAULT_INPAINTING
        if name not in (TRAINED, *INPAINTING):
            raise unknown("inpainting method", name, [TRAINED, *INPAINTING])
        if name == TRAINED and not self.takes_masks:
            raise UserError(
                "this checkpoint was not trained with masks, which method 'trained' needs",
                f"Methods that steer any checkpoint: {', '.join(INPAINTING)}.",
            )
        return name

    def _read_batch(
        self,
        image: Images,
        mask_image: Images,
        height: int | None,
        width: int | None,
        margin: int | None,
        feather: float,
        seamless: bool,
    ) -> InpaintBatch:
        """Return images and masks, and the part of each that is drawn, of which size.

        One image or mask serves several of the other; each is seen whole, or ``margin`` pixels around its hole.

        Raises:
            UserError: numbers of images and masks that do not fit.
        """
        images = read_images(image, height, width) if margin is None else read_images(image)
        size = (images.shape[2], images.shape[3])
        canvas = self.canvas_size(size if margin is None else self.image_size(height, width, None))
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
            log.warning(
                "the mask%s keeps every pixel (none reaches 0.5): the image comes back as it is", which
            )
            masks = masks * hollow[:, None, None, None]  # nothing is drawn that a soft value could blend in
        whole = Window(0, 0, size[1], size[0], size)
        windows = [whole] * count
        if margin is not None:
            windows = [crop_around_mask(mask, max(margin, math.ceil(feather)), canvas) for mask in masks]
        # Half a cell of the latent grid: the scale of the autoencoder's errors.
        depth = self.vae_scale_factor / 2.0 if seamless else None
        return InpaintBatch(images, masks, windows, canvas, feather, depth)

    def _add_known(
        self, method: str, views: Tensor, holes: Tensor, given: Tensor | None, call: RunningCall
    ) -> Tensor:
        """Return latents (B, C, h, w) of what is kept, and add them to the condition where the method has it so.

        Args:
            views, holes: what the network sees, (P, 3, H, W) in [-1, 1] and (P, 1, H, W) in {0, 1}.
            given: such latents from the caller.
        """
        model = self.model
        if method in CONDITIONED and self.takes_masks:
            call.rows = model.with_known(call.rows, views, holes, given)
            return model.known_latents(call.rows)
        with model.steady_vae() as vae:
            known = masked_latents(vae, views, holes)
        return call.expand(known if given is None else given.to(known))


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


def only_in(
    hole: Tensor, known: Tensor, velocity: BindVelocity, after_step: AfterStep
) -> tuple[BindVelocity, AfterStep]:
    """Return a flow that moves in the hole only: whatever a solver does to the known latents, such as adding noise.

    In the hole it is an ordinary flow from noise, under the condition of what is known, so every solver is right.
    """

    def put(x: Tensor) -> Tensor:
        return torch.where(hole > 0, x, known.to(x))

    def moving(times: Tensor | None) -> Velocity:
        everywhere = velocity(times)
        return lambda x, t: torch.where(hole > 0, everywhere(put(x), t), 0.0)

    return moving, lambda i, t, x: put(after_step(i, t, put(x)))


def steered(method: Callable[..., Tensor], known: Tensor, hole: Tensor) -> Sampler:
    """Return a function of ``INPAINTING`` as a sampler, which is called as ``integrate`` is."""

    def sampler(velocity: Velocity, x: Tensor, times: Tensor, **options: Any) -> Tensor:
        return method(velocity, x, known, hole, times, **options)

    return sampler
