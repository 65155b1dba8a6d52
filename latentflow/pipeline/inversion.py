"""From images to their noise and back: inversion, and the way from one image or prompt to another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor

from ..errors import UserError, plural
from ..families.few_steps import require_velocity
from ..families.model import Generators, Rows, Size
from ..families.rows import keep
from ..flow import Solver, Velocity, integrate, slerp
from ..flow.editing import deterministic
from .adapter_scale import AdapterScale
from .arguments import ClassLabels, ConditionArguments, StepCallback, check_embeds, check_noise, checked
from .calls import CallMixin
from .images import Images
from .originals import Originals, read_originals
from .sampling import BindVelocity, RunningCall, by_row
from .scheduler import times_from_sigmas


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


class InversionCalls(CallMixin):
    """The calls ``invert`` and ``interpolate`` of ``LatentFlowEditPipeline``, whatever flow model they call."""

    @checked
    def invert(
        self,
        image: Images = None,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        class_labels: ClassLabels | None = None,
        solver: str = "heun",
        measure: bool = True,
        max_sequence_length: int | None = None,
        height: int | None = None,
        width: int | None = None,
        sigmas: list[float] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | Rows | None = None,
        negative_prompt_embeds: Tensor | Rows | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        **adapters: Unpack[AdapterScale],
    ) -> Inversion:
        """Return the noise that the flow turns into these images.

        To have them back, call ``LatentFlowPipeline`` with ``latents=`` the noise and the same prompt, steps, solver
        and guidance. It goes beyond images of the kind that the checkpoint draws: whatever the autoencoder can copy.

        Args:
            image, prompt, class_labels, height, width, latents: as in a call; without a condition they are taken as
                unlabelled.
            num_inference_steps, solver: see ``Inversion.error`` for whether they suffice.
            sigmas: as in ``LatentFlowPipeline``, from 1.0 (noise) on; they are gone over from the image to the noise.
            guidance_scale: default: none. More stretches the noise, and makes the way back less accurate.
            measure: also go forth again to measure the error, which takes as long again.

        Raises:
            UserError: as a call.
        """
        require_velocity(self.model)
        deterministic(solver)
        guidance_scale = self.model.unguided if guidance_scale is None else guidance_scale
        originals = read_originals(self, image, latents, height, width)
        times = self._whole_grid(num_inference_steps, sigmas, originals.canvas)
        return self._inverted(ConditionArguments.of(locals()), originals, times, solver, measure)

    def _inverted(
        self,
        asked: ConditionArguments,
        originals: Originals,
        times: Tensor,
        solver: str | Solver,
        measure: bool,
    ) -> Inversion:
        """Do what ``invert`` does, its arguments checked and its images read."""
        method = by_row(solver)
        call = self._start(asked, originals.canvas, len(originals), may_lack_condition=True)
        x1, velocity = call.expand(originals.latents(self)), call.velocity()
        call.rows = self.model.with_latent_variable(call.rows, like=x1, mean=True)
        state = integrate(velocity, x1, times.flip(0), method, progress=self.progress_bar)
        error = None
        if measure:
            again = integrate(velocity, state, times, method, progress=self.progress_bar)
            error = (again - x1).square().flatten(1).mean(1).sqrt()
        return Inversion(self.model.noise_of(state, times), error, originals.size)

    @checked
    def interpolate(
        self,
        prompt: str | list[str] | None = None,
        image: Images = None,
        frames: int = 8,
        num_inference_steps: int = 20,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
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
        sigmas: list[float] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | Rows | None = None,
        negative_prompt_embeds: Tensor | Rows | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        **adapters: Unpack[AdapterScale],
    ) -> Any:
        """Draw images on the way from one image, or prompt, to another.

        The noise moves along an arc (``slerp``), the velocity from the one under the first condition to the one under
        the second in proportion. That is a straight line in the scores of the two, so it works for classes and for
        texts of any lengths, and is exact at its ends.

        Args:
            prompt: one for the whole way, or [first, last]. None: no condition.
            image: [first, last]: their noise, by inversion under their prompts. None: drawn noise.
            frames: how many, the ends included; at least 2.
            num_inference_steps: from noise to data, and from images to noise.
            sigmas: as in ``LatentFlowPipeline``; with images from 1.0 (noise) on.
            guidance_scale: default: 4 without images; with them 1, at which they are hit best.
            generator: without images: one draws one noise for all frames; a list of two the first and the last.
            class_labels: one class for the whole way, or [first, last].
            latents: the noise (1, C, h, w) of all frames or (2, C, h, w) of the first and the last, as ``invert``
                returns it, in the place of ``image`` and ``generator``.
            prompt_embeds, prompt_attention_mask: one row for the whole way, or two.
            negative_prompt_embeds, negative_prompt_attention_mask: one row.

        Returns:
            As a call; the first frame is the first image (through the autoencoder) or what its prompt draws.

        Raises:
            UserError: as a call; not two of what two are needed of.
        """
        require_velocity(self.model)
        deterministic(solver)
        if guidance_scale is None:
            guidance_scale = self.usual_guidance if image is None else 1.0
        if isinstance(negative_prompt, list) and len(negative_prompt) > 1:
            raise UserError(f"{len(negative_prompt)} negative prompts", "Pass one for the whole way.")
        prompts = as_many(prompt, 2, "prompt")
        labels = as_many(class_labels, 2, "class_labels")
        check_embeds(self.model, "prompt", prompt, prompt_embeds, prompt_attention_mask)
        embeds, mask = (_both(value) for value in (prompt_embeds, prompt_attention_mask))
        originals = None
        if image is not None:
            originals = read_originals(self, image, latents, height, width)
            times = self._whole_grid(num_inference_steps, sigmas, originals.canvas)
            if len(originals) != 2:
                raise UserError(
                    f"{plural(len(originals), 'image')} to interpolate between", "Pass [first, last]."
                )
            size, canvas = originals.size, originals.canvas
        else:
            size = canvas = self.image_size(height, width, latents)
        given = latents if latents is not None else generator if isinstance(generator, list) else [generator]
        if len(given) > 2:
            what = "generators" if latents is None else "latents"
            raise UserError(f"{len(given)} {what}", "Pass one for all frames, or [first, last].")
        if originals is None:
            check_noise(self.model, len(given), *size, generator, latents)
        # 1. The two conditions, each for all frames
        asked = replace(ConditionArguments.of(locals()), generator=None)
        ends = (
            replace(
                asked,
                prompt=None if prompts is None else prompts[end],
                class_labels=None if labels is None else labels[end],
                prompt_embeds=None if embeds is None else embeds[end : end + 1],
                prompt_attention_mask=None if mask is None else mask[end : end + 1],
            )
            for end in (0, 1)
        )
        first, last = (
            self._start(replace(end, num_images_per_prompt=frames), canvas, 1, may_lack_condition=True)
            for end in ends
        )
        latent_variables = self._share_latent_variable(first, last, originals, generator)
        # 2. The noise of the first and the last frame
        if originals is None:
            noise = self.prepare_noise(len(given), *size, generator, latents)
        else:
            both = replace(
                asked, prompt=prompts, class_labels=labels, prompt_embeds=embeds, prompt_attention_mask=mask
            )
            noise = self._inverted(both, originals, times, solver, measure=False).latents
        # 3. From noise to data
        shares = torch.linspace(0.0, 1.0, frames, device=noise.device)
        one_condition = _same(prompts) and _same(labels) and _same(embeds) and _same(mask)
        one_condition &= latent_variables == 1
        images = self.sample(
            first.velocity if one_condition else _between(first, last, shares),
            slerp(noise[:1].expand(frames, -1, -1, -1), noise[-1:].expand(frames, -1, -1, -1), shares),
            num_inference_steps,
            sigmas,
            solver,
            None,
            first.after_step,
        )
        return self.finish_call(self.to_images(images, output_type, size), return_dict)

    # ---------------------------------------------------------------- the parts of a call

    def _share_latent_variable(
        self,
        first: RunningCall,
        last: RunningCall,
        originals: Originals | None,
        generator: Generators | None,
    ) -> int:
        """Give two calls the latent variables of two images, or one that is drawn, for all of their rows.

        Returns:
            The number of different ones, or 1 of a network without.
        """
        model = self.model
        if model.latent_variable is None:
            return 1
        if originals is None:
            drawn = generator[:1] if isinstance(generator, list) else generator
            z = model.with_latent_variable(first.rows[[0]], drawn).kept["z"]
            assert isinstance(z, Tensor)
            first.rows, last.rows = (keep(call.rows, z=z) for call in (first, last))
            return 1
        x1 = originals.latents(self)
        for call, one in zip((first, last), x1.split(1), strict=True):
            call.rows = model.with_latent_variable(call.rows, like=one, mean=True)
        return 2

    def _start(
        self, asked: ConditionArguments, canvas: Size, images: int, *, may_lack_condition: bool = False
    ) -> RunningCall:
        """Call ``start_call``; where a condition may lack, "" and None are the network without any.

        Args:
            canvas: (height, width) in pixels of what the latents cover.
        """
        asked = replace(asked, latents=None)  # those of the call are no noise that has to fit the rows
        prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt or []
        if may_lack_condition and not any(prompts):
            text_alone = self.takes_text and not self.takes_classes
            encoder = getattr(self, "text_encoder", None)  # some families have none, or call it otherwise
            encodes = text_alone and encoder is not None and asked.prompt_embeds is None
            asked = replace(asked, prompt="" if encodes else None)
        condition = asked.prompt, asked.prompt_embeds, asked.class_labels
        if not may_lack_condition or any(value is not None for value in condition):
            return self.start_call(asked, *canvas, images)
        if asked.negative_prompt is not None or asked.negative_prompt_embeds is not None:
            raise UserError("a negative prompt without a prompt", "Guidance needs both: leave it out.")
        count = images * asked.num_images_per_prompt
        self.require_room(count, *canvas)
        self._guidance_scale, self._interrupt = self.model.guidance(asked.guidance_scale), False
        callback = asked.callback_on_step_end, asked.callback_on_step_end_tensor_inputs
        return RunningCall(self, self.model.unlabelled(count), None, *callback)

    def _grid(self, steps: int, sigmas: list[float] | None, canvas: Size) -> Tensor:
        """Return the times of a call."""
        return self.model.time_grid(steps, *canvas) if sigmas is None else times_from_sigmas(sigmas)

    def _whole_grid(self, steps: int, sigmas: list[float] | None, canvas: Size) -> Tensor:
        """Return the times of an inversion.

        Raises:
            UserError: they do not lead back to noise.
        """
        times = self._grid(steps, sigmas, canvas)
        if sigmas is not None and times[0] != 0.0:
            raise UserError(
                f"sigmas begin at {1.0 - float(times[0]):g}", "Begin with 1.0: an inversion leads to noise."
            )
        return times


def as_many(values: Any, count: int, name: str) -> list[Any] | None:
    """Return one value, or one for each of ``count``, as a list of ``count``."""
    if values is None:
        return None
    rows = [values] if isinstance(values, str | int) else list(values)
    if len(rows) not in (1, count):
        raise UserError(f"{name} has {len(rows)} entries", f"Pass one, or {count}.")
    return rows * (count // len(rows))


def _both(rows: Tensor | Rows | None) -> Any:
    """Return the rows of the first and of the last frame; a single one is both.

    Raises:
        UserError: there are more.
    """
    if rows is not None and len(rows) > 2:
        raise UserError(f"prompt_embeds of {len(rows)} prompts", "Pass one for all frames, or [first, last].")
    return rows if rows is None or len(rows) == 2 else rows[[0, 0]]


def _same(values: Any) -> bool:
    """Return whether both of two values, which may lack, are the same."""
    if isinstance(values, Tensor):
        return torch.equal(values[0], values[1])
    return values is None or values[0] == values[1]


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
