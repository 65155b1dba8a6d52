"""``LatentFlowInpaintPipeline``: fill a hole in an image, and keep every other pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from ..autoencoder import latent_mask, masked_latents, masked_source
from ..errors import UserError, unknown
from ..families.few_steps import require_velocity
from ..families.model import Generators, Rows
from ..flow import Velocity
from ..flow.inpainting import DEFAULT_INPAINTING, INPAINTING
from .adapter_scale import AdapterScale
from .arguments import TUNED, ClassLabels, ConditionArguments, StepCallback, checked
from .base import FlowPipeline
from .calls import CallMixin
from .control import read_control
from .images import Images, transparent_again
from .inpaint_batch import read_batch
from .jumps import keeping
from .sampling import BindVelocity, RunningCall
from .steps import AfterStep, Sampler

TRAINED = "trained"
#: the method of tokens, which has no name in a call: those that are known stay
KEPT = "kept"
#: methods that see the hole as a condition where the network was trained with masks: "pnp-flow" steers it all the same
CONDITIONED = (TRAINED, "pnp-flow")
#: Fresh noise corrects what a network got wrong on the way, which in a large hole is much:
#: docs/measurements/inpainting.md.
TRAINED_SOLVER = "ddpm"


class InpaintCall(CallMixin):
    """The call of ``LatentFlowInpaintPipeline``, whatever flow model it calls."""

    @checked
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
        method: str | None = None,
        feather: float = 0,
        seamless: bool = True,
        control_image: Images = None,
        control_scale: float | Mapping[str, float] = 1.0,
        temperature: float = 1.0,
        corrector: float = 0.0,
        **adapters: Unpack[AdapterScale],
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
                or 4 of a checkpoint of average velocities, which method "trained" alone takes; 16 of tokens; of a
                consistency model its own.
            latents: the noise (B, C, h, w) to start from.
            output_type: as of ``LatentFlowPipeline``; "latent" are those of the part that was drawn, uncomposed.
            method: "trained", or a key of ``latentflow.flow.INPAINTING``; default:
                ``latentflow.flow.inpainting.DEFAULT_INPAINTING``, but "trained" where a checkpoint was trained with
                masks and a solver or a scheduler is given, or it predicts average velocities. "trained" takes any of
                these, by itself 'ddpm', or average velocities; the others run on our own solvers. "trained" and
                "pnp-flow" give a checkpoint that was trained with masks the hole as a condition, the others do not.
                A pretrained model that fills only has it always; its default is "trained", with its own solver.
                A consistency model takes "pnp-flow" alone. A checkpoint of tokens takes none: it keeps known tokens.
                "repaint" goes back in time, which the timesteps that a callback gets do not show.
            feather: blend over so many pixels around the hole, which are then no longer the image's own.
            seamless: shift the colours of what is drawn to meet those around the hole (``match_border``). False:
                leave it as it is drawn.
            control_image, control_scale: as of ``LatentFlowPipeline``; it lies on the image as ``mask_image`` does.

        Returns:
            ``ImagePipelineOutput`` with ``images``, or the tuple. Pixels where the (feathered) mask is 0 are the
            image's own, in sRGB. PIL images are RGBA where the image has transparency: what is kept keeps its
            alpha and the colours under it, what is painted is opaque. Arrays and tensors are RGB, on white.

        Raises:
            UserError: as ``LatentFlowPipeline``; also images, masks, a strength or a method that are none.
        """
        method = self._method(method, solver)
        # 1. Images, masks, and the window of each that is drawn
        batch = read_batch(self, image, mask_image, height, width, padding_mask_crop, feather, seamless)
        if batch.unchanged:
            strength = 0.0
        shape = (len(batch.images), *self.model.latent_shape(*batch.canvas))
        if masked_image_latents is not None and tuple(masked_image_latents.shape) != shape:
            raise UserError(
                f"masked_image_latents have shape {tuple(masked_image_latents.shape)}",
                f"For these inputs it is {shape}.",
            )
        # 2. The condition, one row per image
        asked = ConditionArguments.of(locals())
        controls = None
        if control_image is not None:
            size = (batch.images.shape[2], batch.images.shape[3])
            controls = batch.network_controls(read_control(self.model, control_image, size))
        call = self.start_call(asked, *batch.canvas, images=len(batch.images), fills=True, controls=controls)
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
        if method == TRAINED and self.scheduler is None and not self.few_steps and not self._fills_only:
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
            sampler=_sampler(method, known, hole),
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

    @property
    def _fills_only(self) -> bool:
        """True for a model that takes the hole as a condition always, and is sampled as its stock pipeline does."""
        return self.model.image_input == "mask"

    def _method(self, name: str | None, solver: str | None) -> str:
        """Return the method that a call uses.

        Raises:
            UserError: there is none of this name, or this checkpoint cannot.
        """
        if self.model.draws_tokens:
            if name is not None:
                raise UserError(
                    f"method '{name}' with a checkpoint of tokens, which keeps those that are known",
                    "Leave the method out.",
                )
            return KEPT
        if name is None and self._fills_only:
            return TRAINED
        if name is None:
            chosen = bool(self.few_steps) or solver is not None or self.scheduler is not None
            name = TRAINED if self.takes_masks and chosen else DEFAULT_INPAINTING
        if name not in (TRAINED, *INPAINTING):
            raise unknown("inpainting method", name, [TRAINED, *INPAINTING])
        if solver == TUNED:
            raise UserError(
                "solver='tuned' fills no holes: it was tuned to images from noise alone",
                "Leave the solver out.",
            )
        if name not in CONDITIONED or solver is not None or (name == TRAINED and not self.takes_masks):
            require_velocity(self.model)
        if name == TRAINED and not self.takes_masks:
            raise UserError(
                "this checkpoint was not trained with masks, which method 'trained' needs",
                f"Methods that steer any checkpoint: {', '.join(INPAINTING)}.",
            )
        return name

    def _add_known(
        self, method: str, views: Tensor, holes: Tensor, given: Tensor | None, call: RunningCall
    ) -> Tensor:
        """Return latents (B, C, h, w), or tokens, of what is kept; and add them to the condition where the method has
        it so.

        Args:
            views, holes: what the network sees, (P, 3, H, W) in [-1, 1] and (P, 1, H, W) in {0, 1}.
            given: such latents from the caller.
        """
        model: Any = self.model
        if method == KEPT:
            return call.expand(model.known_tokens(views, holes) if given is None else given.to(views.device))
        if self.takes_masks and (method in CONDITIONED or self._fills_only):
            call.rows = model.with_known(call.rows, views, holes, given)
            latents: Tensor = model.known_latents(call.rows)
            return latents
        with model.steady_vae() as vae:
            known = masked_latents(vae, views, holes)
        return call.expand(known if given is None else given.to(known))


class LatentFlowInpaintPipeline(InpaintCall, FlowPipeline):
    """Fill the hole that a mask leaves in an image; what is not masked is the image's own, to the pixel.

    ``LatentFlowInpaintPipeline.from_pipe(pipe)`` shares the components of any other of our pipelines. The flow is
    steered towards what is known; a checkpoint that was trained with masks has it as a condition too, and fills better.

    Outpainting: ``image, mask = latentflow.expand_canvas(image, right=32)`` makes the arguments.
    """

    call = InpaintCall


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


def _sampler(method: str, known: Tensor, hole: Tensor) -> Sampler | None:
    """Return what goes from noise to data by a method; None: the pipeline's own solvers."""
    if method == TRAINED:
        return None
    return keeping(known, hole) if method == KEPT else steered(INPAINTING[method], known, hole)


def steered(method: Callable[..., Tensor], known: Tensor, hole: Tensor) -> Sampler:
    """Return a function of ``INPAINTING`` as a sampler, which is called as ``integrate`` is."""

    def sampler(velocity: Velocity, x: Tensor, times: Tensor, **options: Any) -> Tensor:
        return method(velocity, x, known, hole, times, **options)

    return sampler
