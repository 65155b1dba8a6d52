"""``LatentFlowEditPipeline``: edit images with words, turn them into noise and back, interpolate between them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, lookup
from ..families.model import Generators, Size
from ..flow import EDITING, Solver, Velocity, integrate, slerp, time_grid
from ..flow.editing import deterministic
from .arguments import ClassLabels, ConditionArguments, StepCallback, check_noise, checked
from .base import FlowPipeline
from .images import Images, padded, read_images
from .sampling import BindVelocity, Interrupted, RunningCall, by_row, last_part


@dataclass(frozen=True)
class Inversion:
    """The noise of images.

    Attributes:
        latents: (B, C, h, w): the noise from which the flow makes the images; ``latents`` of ``LatentFlowPipeline``.
        error: (B,): root mean square difference of the images' latents, whose standard deviation is about 1, and
            those that the flow makes of the noise, with the same steps; None where it was not measured. Below 0.01
            nobody sees it, beside what the autoencoder loses; above 0.1 take more steps.
        size: (height, width) of the images in pixels; the latents cover them padded to the right and below.
    """

    latents: Tensor
    error: Tensor | None
    size: Size


class LatentFlowEditPipeline(FlowPipeline):
    """Edit images: a call changes what words (or classes) describe, ``invert`` turns images into noise,
    ``interpolate`` leads from one image or prompt to another.

    ``LatentFlowEditPipeline.from_pipe(pipe)`` shares the components of any other of our pipelines. It integrates the
    flow by our own solvers alone: a diffusers scheduler cannot go back.
    """

    @checked
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Images = None,
        source_prompt: str | list[str] = "",
        method: str = "flowedit",
        strength: float = 0.9,
        num_inference_steps: int = 20,
        guidance_scale: float = 2.0,
        source_guidance_scale: float = 1.0,
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
    ) -> Any:
        """Edit images. Arguments that are not listed here are those of ``LatentFlowPipeline``.

        Args:
            prompt: what the images should show, as a whole: "green apple", not "make it green".
            image: PIL image(s) of any mode, an array ((B,) H, W, 3) or a tensor ((B,) 3, H, W) in [0, 1]; of any
                size, which is also the result's. One with several prompts, or several with one prompt, will do.
            source_prompt: what they show now: one for all, or one for each. The closer to the caption that training
                would have had, the less changes besides. "" works without.
            method: a key of ``latentflow.flow.EDITING``: "flowedit" goes from image to image, "inversion" through
                the image's noise.
            strength: in [0, 1]: how far back towards noise the edit begins, at t = 1 - strength. 0 is the image
                through the autoencoder; below 0.8 large colours change by half (a red apple turns orange, not green);
                1 is free to change the layout.
            num_inference_steps: of the whole way; about strength * num_inference_steps are taken, twice by inversion.
            guidance_scale: towards ``prompt``. 1 to 2 keep most of the image; more, where an edit is too weak, costs
                sharpness.
            source_guidance_scale: towards ``source_prompt``, on the way back.
            generator: for the noise of "flowedit": one for all, or one for each image, which alone determines it
                (up to rounding, as in ``LatentFlowPipeline``);
                "inversion" draws none.
            callback_on_step_end: as in ``LatentFlowPipeline``; prompt_embeds are the target's. Inversion's first half
                of the steps goes back towards noise.
            class_labels, source_class_labels: classes in place of, or beside, the prompts.
            solver: a key of ``latentflow.flow.SOLVERS`` that draws no noise; default: euler for flowedit, heun for
                inversion.
            draws, plain_from: settings of "flowedit", see ``latentflow.flow.flow_edit``; default: 1 and 1.
            height, width: resize the image to them first.

        Returns:
            ``ImagePipelineOutput`` with ``images``, or the tuple; with output_type "latent" their latents, which
            cover the image padded to the right and below.

        Raises:
            UserError: as ``LatentFlowPipeline``; also a checkpoint without a condition, an image, strength, method,
                solver or setting that is none, numbers of images and (source) prompts that do not fit.
        """
        settings = _settings(method, solver=solver, draws=draws, plain_from=plain_from)
        if not (self.takes_text or self.takes_classes):
            fix = "Vary the image with LatentFlowImg2ImgPipeline, or paint with LatentFlowInpaintPipeline."
            raise UserError(
                "this checkpoint takes neither prompt nor classes: there is nothing to edit by", fix
            )
        images = read_images(image, height, width)
        size = (images.shape[2], images.shape[3])
        if source_class_labels is not None and self.takes_classes:
            self.class_ids(source_class_labels)  # refused before the target's prompt is encoded
        # 1. What the images should show, and what they show now, one row per image
        asked = ConditionArguments.of(locals())
        target = self._start(asked, size, len(images))
        count = len(target.rows) // num_images_per_prompt
        source = self._start(
            ConditionArguments(
                prompt=_as_many(source_prompt, count, "source_prompt"),
                class_labels=_as_many(source_class_labels, count, "source_class_labels"),
                num_images_per_prompt=num_images_per_prompt,
                guidance_scale=source_guidance_scale,
                guidance_interval=guidance_interval,
                max_sequence_length=max_sequence_length,
            ),
            size,
            count,
            may_lack_condition=True,
        )
        source.scale = self._guidance_scale
        self._guidance_scale = self.model.guidance(guidance_scale)  # a callback sees it, and may change it
        if "generator" in inspect.signature(EDITING[method]).parameters:
            settings["generator"] = generator
        # 2. From image to image
        x1 = target.expand(self._latents_of(images))
        times = last_part(time_grid(num_inference_steps), strength)
        begins = times[:-1] if method != "inversion" else torch.cat([times.flip(0)[:-1], times[:-1]])
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
        return self.finish_call(self.to_images(x1, output_type, size), return_dict)

    @checked
    @torch.no_grad()
    def invert(
        self,
        image: Images,
        prompt: str | list[str] = "",
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        class_labels: ClassLabels | None = None,
        solver: str = "heun",
        measure: bool = True,
        max_sequence_length: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Inversion:
        """Return the noise that the flow turns into these images.

        To have them back, call ``LatentFlowPipeline`` with ``latents=`` the noise and the same prompt, steps, solver
        and guidance. It goes beyond images of the kind that the checkpoint draws: whatever the autoencoder can copy.

        Args:
            image, prompt, class_labels, height, width: as in a call; without a condition they are taken as unlabelled.
            num_inference_steps, solver: see ``Inversion.error`` for whether they suffice.
            guidance_scale: more than 1 stretches the noise, and makes the way back less accurate.
            measure: also go forth again to measure the error, which takes as long again.

        Raises:
            UserError: as a call.
        """
        deterministic(solver)
        asked, images = ConditionArguments.of(locals()), read_images(image, height, width)
        return self._inverted(asked, images, num_inference_steps, solver, measure)

    def _inverted(
        self, asked: ConditionArguments, images: Tensor, steps: int, solver: str | Solver, measure: bool
    ) -> Inversion:
        """Do what ``invert`` does, its arguments checked and its images read."""
        method, size = by_row(solver), (images.shape[2], images.shape[3])
        call = self._start(asked, size, len(images), may_lack_condition=True)
        x1, times, velocity = call.expand(self._latents_of(images)), time_grid(steps), call.velocity()
        noise = integrate(velocity, x1, times.flip(0), method, progress=self.progress_bar)
        error = None
        if measure:
            again = integrate(velocity, noise, times, method, progress=self.progress_bar)
            error = (again - x1).square().flatten(1).mean(1).sqrt()
        self.maybe_free_model_hooks()
        return Inversion(noise, error, size)

    @checked
    @torch.no_grad()
    def interpolate(
        self,
        prompt: str | list[str] = "",
        image: Images = None,
        frames: int = 8,
        num_inference_steps: int = 20,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        generator: Generators | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        max_sequence_length: int | None = None,
        class_labels: ClassLabels | None = None,
        solver: str = "heun",
        height: int | None = None,
        width: int | None = None,
    ) -> Any:
        """Draw images on the way from one image, or prompt, to another.

        The noise moves along an arc (``slerp``), the velocity from the one under the first condition to the one under
        the second in proportion. That is a straight line in the scores of the two, so it works for classes and for
        texts of any lengths, and is exact at its ends.

        Args:
            prompt: one for the whole way, or [first, last].
            image: [first, last]: their noise, by inversion under their prompts. None: drawn noise.
            frames: how many, the ends included; at least 2.
            num_inference_steps: from noise to data, and from images to noise.
            guidance_scale: default: 4 without images; with them 1, at which they are hit best.
            generator: without images: one draws one noise for all frames; a list of two the first and the last.
            class_labels: one class for the whole way, or [first, last].

        Returns:
            As a call; the first frame is the first image (through the autoencoder) or what its prompt draws.

        Raises:
            UserError: as a call; not two of what two are needed of.
        """
        deterministic(solver)
        if guidance_scale is None:
            guidance_scale = self.usual_guidance if image is None else 1.0
        prompts = _as_many(prompt, 2, "prompt") or ["", ""]
        labels = _as_many(class_labels, 2, "class_labels")
        images = None if image is None else read_images(image, height, width)
        if images is not None and len(images) != 2:
            raise UserError(f"{len(images)} images to interpolate between", "Pass [first, last].")
        if isinstance(generator, list) and len(generator) > 2:
            raise UserError(f"{len(generator)} generators", "Pass one for all frames, or [first, last].")
        size = self.image_size(height, width) if images is None else (images.shape[2], images.shape[3])
        ends = len(generator) if isinstance(generator, list) else 1
        if images is None:
            check_noise(self.model, ends, *size, generator)
        # 1. The two conditions, each for all frames
        asked = replace(ConditionArguments.of(locals()), generator=None)
        first, last = (
            self._start(
                replace(
                    asked,
                    prompt=prompts[end],
                    class_labels=None if labels is None else labels[end],
                    num_images_per_prompt=frames,
                ),
                size,
                1,
                may_lack_condition=True,
            )
            for end in (0, 1)
        )
        # 2. The noise of the first and the last frame
        if images is None:
            noise = self.prepare_noise(ends, *size, generator, None)
        else:
            both = replace(asked, prompt=prompts, class_labels=labels)
            noise = self._inverted(both, images, num_inference_steps, solver, measure=False).latents
        # 3. From noise to data
        shares = torch.linspace(0.0, 1.0, frames, device=noise.device)
        one_condition = prompts[0] == prompts[1] and (labels is None or labels[0] == labels[1])
        latents = self.sample(
            first.velocity if one_condition else _between(first, last, shares),
            slerp(noise[:1].expand(frames, -1, -1, -1), noise[-1:].expand(frames, -1, -1, -1), shares),
            num_inference_steps,
            None,
            solver,
            None,
            first.after_step,
        )
        return self.finish_call(self.to_images(latents, output_type, size), return_dict)

    # ---------------------------------------------------------------- the parts of a call

    def _latents_of(self, images: Tensor) -> Tensor:
        """Return the latents (P, C, h, w) of images (P, 3, H, W) in [0, 1]."""
        canvas = self.canvas_size((images.shape[2], images.shape[3]))
        return self.encode_images(2.0 * padded(images, canvas).to(self._execution_device) - 1.0)

    def _start(
        self, asked: ConditionArguments, size: Size, images: int, *, may_lack_condition: bool = False
    ) -> RunningCall:
        """Call ``start_call``; where a condition may lack, "" and None are the network without any."""
        (height, width), prompt = self.canvas_size(size), asked.prompt
        if may_lack_condition and not any([prompt] if isinstance(prompt, str) else prompt or []):
            prompt = "" if self.takes_text and not self.takes_classes else None
        if not may_lack_condition or prompt is not None or asked.class_labels is not None:
            return self.start_call(replace(asked, prompt=prompt), height, width, images)
        if asked.negative_prompt is not None:
            raise UserError("a negative prompt without a prompt", "Guidance needs both: leave it out.")
        count = images * asked.num_images_per_prompt
        self.require_room(count, height, width)
        self._guidance_scale, self._interrupt = self.model.guidance(asked.guidance_scale), False
        callback = asked.callback_on_step_end, asked.callback_on_step_end_tensor_inputs
        return RunningCall(self, self.model.rows(None, count=count), None, *callback)


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


def _as_many(values: Any, count: int, name: str) -> list[Any] | None:
    """Return one value, or one for each of ``count``, as a list of ``count``."""
    if values is None:
        return None
    rows = [values] if isinstance(values, str | int) else list(values)
    if len(rows) not in (1, count):
        raise UserError(f"{len(rows)} of {name} where there are {count}", f"Pass one, or {count}.")
    return rows * (count // len(rows))


def _between(first: RunningCall, last: RunningCall, shares: Tensor) -> BindVelocity:
    """Return the velocity of row b, ``shares[b]`` of the way from the first condition to the last."""
    weights = shares[:, None, None, None]

    def bound(times: Tensor | None) -> Velocity:
        one, other = first.velocity(times), last.velocity(times)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            value = torch.lerp(one(x, t), other(x, t), weights)
            if first.prediction is not None and last.prediction is not None:
                first.prediction = torch.lerp(first.prediction, last.prediction, weights)
            return value

        return velocity

    return bound
