"""``LatentFlowEditPipeline``: edit images with words, turn them into noise and back, interpolate between them."""

from __future__ import annotations

import inspect
from typing import Any, Unpack

import torch
from torch import Tensor

from ..errors import UserError, lookup
from ..families.few_steps import require_velocity
from ..families.model import Generators, Rows
from ..flow import EDITING
from .adapter_scale import AdapterScale
from .arguments import ClassLabels, ConditionArguments, StepCallback, check_embeds, checked
from .base import FlowPipeline
from .images import Images
from .inversion import InversionCalls, as_many
from .originals import read_masked_originals
from .references import edit_by_reference
from .sampling import by_row
from .steps import Interrupted, last_part


class EditCalls(InversionCalls):
    """The call of ``LatentFlowEditPipeline``, whatever flow model it calls."""

    @checked
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Images = None,
        source_prompt: str | list[str] | None = None,
        method: str | None = None,
        strength: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        source_guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        max_sequence_length: int | None = None,
        class_labels: ClassLabels | None = None,
        source_class_labels: ClassLabels | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        solver: str | None = None,
        draws: int | None = None,
        plain_from: float | None = None,
        height: int | None = None,
        width: int | None = None,
        sigmas: list[float] | None = None,
        latents: Tensor | None = None,
        mask_image: Images = None,
        padding_mask_crop: int | None = None,
        feather: float = 0,
        seamless: bool = False,
        prompt_embeds: Tensor | Rows | None = None,
        negative_prompt_embeds: Tensor | Rows | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        source_prompt_embeds: Tensor | Rows | None = None,
        source_prompt_attention_mask: Tensor | None = None,
        reference_images: Images = None,
        **adapters: Unpack[AdapterScale],
    ) -> Any:
        """Edit images. Arguments that are not listed here are those of ``LatentFlowPipeline``.

        Args:
            prompt: what the images should show, as a whole: "green apple", not "make it green"; with method "reference"
                an instruction: "make the apple green".
            image: PIL image(s) of any mode, an array ((B,) H, W, 3) or a tensor ((B,) 3, H, W) in [0, 1]; of any
                size, which is also the result's (but see method "reference"). One with several prompts, or several with
                one prompt, will do.
            source_prompt: what they show now: one for all, or one for each. The closer to the caption that training
                would have had, the less changes besides. None works without.
            method: a key of ``latentflow.flow.EDITING``: "flowedit" goes from image to image, "inversion" through
                the image's noise; or "reference", of models that draw from images, such as FLUX.2, Kontext and
                Qwen-Image-Edit: see ``latentflow.pipeline.references``. Default: "reference" where the model draws from
                images, else "flowedit".
            strength: in [0, 1]: how far back towards noise the edit begins, at t = 1 - strength. 0 is the image
                through the autoencoder; below 0.8 large colours change by half (a red apple turns orange, not green);
                1 is free to change the layout. Default: ``model.edit_defaults``, usually 0.9.
            num_inference_steps: of the whole way, of which those after t = 1 - strength are taken, twice by "inversion"
                and "direct". Default: ``model.edit_defaults``, usually 20.
            guidance_scale: towards ``prompt``; default: 2, or 1 where a scale of 0 is none (Z-Image); for "flowedit" of
                some families ``model.edit_defaults``. 1 to 2 keep most of the image; more, where an edit is too weak,
                costs sharpness.
            source_guidance_scale: towards ``source_prompt``, on the way back; default: none; for "flowedit" of some
                families ``model.edit_defaults``.
            generator: for the noise of "flowedit": one for all, or one for each image, which alone determines it
                (up to rounding, as in ``LatentFlowPipeline``);
                "inversion" draws none.
            callback_on_step_end: as in ``LatentFlowPipeline``; prompt_embeds are the target's. Inversion's first half
                of the steps goes back towards noise.
            class_labels, source_class_labels: classes in place of, or beside, the prompts.
            solver: a key of ``latentflow.flow.SOLVERS`` that draws no noise; default: euler for flowedit, heun for
                inversion.
            draws, plain_from: settings of "flowedit", see ``latentflow.flow.flow_edit``; default: 1 and 1.
            height, width: resize the image to them first; with ``padding_mask_crop``, and with method "reference", the
                size to draw at.
            latents: the images' latents (P, C, h, w) in the place of ``image``, such as an earlier call returned with
                output_type "latent": an edit starts from the image, not from noise. Where they cover an image padded,
                ``height`` and ``width`` say its size.
            mask_image, padding_mask_crop, feather, seamless: edit within a mask only (white), as in
                ``LatentFlowInpaintPipeline``; what is drawn still follows from the image. Every other pixel is the
                image's own. ``seamless`` is off: it would take back a colour that the edit changes up to the border.
            source_prompt_embeds, source_prompt_attention_mask: as ``prompt_embeds``, in the place of ``source_prompt``.
            reference_images: further images, of any sizes, that the prompt may speak of; for method "reference".
            prompt_embeds: with method "reference", rows with the images that they were encoded with,
                ``model.encode_prompt([...], images=[...])``; ``image`` then gives only the size, and what a mask keeps.

        Returns:
            ``ImagePipelineOutput`` with ``images``, or the tuple; with output_type "latent" their latents, which
            cover the image padded to the right and below (with a mask: the part that was drawn, uncomposed).

        Raises:
            UserError: as ``LatentFlowPipeline``; also a checkpoint without a condition, an image, strength, method,
                solver or setting that is none, numbers of images and (source) prompts that do not fit.
        """
        if not (self.takes_text or self.takes_classes):
            fix = "Vary the image with LatentFlowImg2ImgPipeline, or paint with LatentFlowInpaintPipeline."
            raise UserError(
                "this checkpoint takes neither prompt nor classes: there is nothing to edit by", fix
            )
        refers = self.model.image_input == "reference"
        if method is None:
            method = "reference" if refers else "flowedit"
        self.model.check_image_input(refers=method == "reference")
        if method == "reference":
            return edit_by_reference(self, locals())
        if reference_images is not None:
            fix = (
                "Use method 'reference'."
                if refers
                else "Leave them out: this model does not draw from images."
            )
            raise UserError(f"reference_images are given to method '{method}'", fix)
        require_velocity(self.model)
        usual = self.model.edit_defaults
        if method != "flowedit":  # which alone stays near the image under much guidance
            none = self.model.unguided
            usual = usual._replace(source_guidance=none, guidance=none + 1.0)
        strength = usual.strength if strength is None else strength
        steps = usual.steps if num_inference_steps is None else num_inference_steps
        if guidance_scale is None:
            guidance_scale = self.model.guidance(usual.guidance)
        if source_guidance_scale is None:
            source_guidance_scale = self.model.guidance(usual.source_guidance)
        settings = _settings(method, solver=solver, draws=draws, plain_from=plain_from)
        window = height, width, mask_image, padding_mask_crop, feather, seamless
        originals = read_masked_originals(self, image, latents, *window)
        # Refused before the target's prompt is encoded
        described = source_prompt, source_prompt_embeds, source_prompt_attention_mask
        check_embeds(self.model, "source_prompt", *described)
        if source_class_labels is not None and self.takes_classes:
            self.class_ids(source_class_labels)
        # 1. What the images should show, and what they show now, one row per image
        target = self._start(ConditionArguments.of(locals()), originals.canvas, len(originals))
        unsaid = all(value is None for value in (source_prompt, source_prompt_embeds, source_class_labels))
        if unsaid and isinstance(prompt_embeds, Rows) and prompt_embeds.model is not self.model:
            source_prompt_embeds = prompt_embeds.model.null(1)  # this model may have no text encoders
        count = len(target.rows) // num_images_per_prompt
        source = self._start(
            ConditionArguments(
                prompt=as_many(source_prompt, count, "source_prompt"),
                prompt_embeds=source_prompt_embeds,
                prompt_attention_mask=source_prompt_attention_mask,
                class_labels=as_many(source_class_labels, count, "source_class_labels"),
                num_images_per_prompt=num_images_per_prompt,
                guidance_scale=source_guidance_scale,
                guidance_interval=guidance_interval,
                max_sequence_length=max_sequence_length,
            ),
            originals.canvas,
            count,
            may_lack_condition=True,
        )
        source.scale = self._guidance_scale
        self._guidance_scale = self.model.guidance(guidance_scale)  # a callback sees it, and may change it
        if "generator" in inspect.signature(EDITING[method]).parameters:
            settings["generator"] = generator
        # 2. From image to image
        x1 = target.expand(originals.latents(self))
        for call in (source, target):  # both are of the same latent variable, the image's
            call.rows = self.model.with_latent_variable(call.rows, like=x1, mean=True)
        masks = originals.latent_masks(self)
        if masks is not None:
            settings["mask"] = target.expand(masks.to(x1.device))
        times = last_part(self._grid(steps, sigmas, originals.canvas), strength)
        begins = times[:-1] if method == "flowedit" else torch.cat([times.flip(0)[:-1], times[:-1]])
        self._num_timesteps = len(begins)

        def after_step(i: int, reached: Tensor, x: Tensor) -> Tensor:
            x = target.after_step(i, begins[i], x)
            if self._interrupt:
                raise Interrupted(x)
            return x

        if len(begins):
            velocities = source.velocity(), target.velocity()
            options = {"callback": after_step, "progress": self.progress_bar, **settings}
            try:
                x1 = EDITING[method](*velocities, x1, times, **options)
            except Interrupted as interrupted:
                x1 = interrupted.latents
        # 3. From latents to images of the images' size
        return self.finish_call(originals.to_images(self, x1, output_type, image), return_dict)


class LatentFlowEditPipeline(EditCalls, FlowPipeline):
    """Edit images: a call changes what words (or classes) describe, ``invert`` turns images into noise,
    ``interpolate`` leads from one image or prompt to another.

    ``LatentFlowEditPipeline.from_pipe(pipe)`` shares the components of any other of our pipelines. It integrates the
    flow by our own solvers alone: a diffusers scheduler cannot go back.
    """

    call = EditCalls


def _settings(method: str, **given: Any) -> dict[str, Any]:
    """Return those of ``given`` that are not None.

    Raises:
        UserError: the method has no such setting.
    """
    known = inspect.signature(lookup(EDITING, method, "editing method")).parameters
    settings = {name: value for name, value in given.items() if value is not None}
    if "solver" in settings:
        settings["solver"] = by_row(settings["solver"])
    for name in settings:
        if name not in known:
            raise UserError(f"{name} is given, but method '{method}' has no such setting", "Leave it out.")
    return settings
