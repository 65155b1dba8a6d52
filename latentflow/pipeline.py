"""``LatentFlowPipeline``: from a caption, a class or nothing to images, as a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .errors import UserError, unknown
from .flow import Velocity
from .pipeline_base import ClassLabels, FlowPipeline, Generators

StepCallback: TypeAlias = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]


class LatentFlowPipeline(FlowPipeline):
    """Draws images by following a learned velocity from noise (t = 0) to data (t = 1).

    Open one with ``LatentFlowPipeline.from_pretrained(folder_or_hub_id)``; components: see ``FlowPipeline``.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        height: int,
        width: int,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        class_labels: ClassLabels | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> None:
        """Refuse what cannot work, before anything is computed.

        Raises:
            UserError: a size that the autoencoder cannot make (the nearest is named), a condition that is
                missing or that the checkpoint does not take, arguments that exclude each other.
        """
        unit = self.vae_scale_factor * self._network_config("patch_size", 1)
        for what, size in (("height", height), ("width", width)):
            if size <= 0 or size % unit:
                valid = max(1, round(size / unit)) * unit
                raise UserError(f"{what} {size} is not a multiple of {unit}", f"The nearest is {valid}.")
        for name, text, embeds in (
            ("prompt", prompt, prompt_embeds),
            ("negative_prompt", negative_prompt, negative_prompt_embeds),
        ):
            if text is not None and embeds is not None:
                raise UserError(f"both {name} and {name}_embeds are given", "Pass one of them.")
        self.check_condition(
            prompt if prompt_embeds is None else prompt_embeds,
            negative_prompt if negative_prompt_embeds is None else negative_prompt_embeds,
            class_labels,
        )
        for name in callback_on_step_end_tensor_inputs or []:
            if name not in self._callback_tensor_inputs:
                raise unknown("callback tensor", name, self._callback_tensor_inputs)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """The noise to start from, (B, C, height / factor, width / factor), or ``latents`` as they are.

        With a list of generators image b comes from generator b alone, whatever else is in the batch.

        Raises:
            UserError: the list's length is not the number of images, or ``latents`` have another shape.
        """
        factor = self.vae_scale_factor
        shape = (batch_size, num_channels_latents, height // factor, width // factor)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise UserError(
                f"{len(generator)} generators for {batch_size} images",
                "Pass one for each image (prompts x num_images_per_prompt), or a single one.",
            )
        if latents is None:
            noise: Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            return noise
        if tuple(latents.shape) != shape:
            raise UserError(f"latents have shape {tuple(latents.shape)}", f"For these inputs it is {shape}.")
        return latents.to(device, dtype)

    def _size(self, height: int | None, width: int | None, latents: Tensor | None) -> tuple[int, int]:
        """Height and width in pixels: as asked for, else of the given latents, else as in training."""
        native = self._network_config("sample_size") if latents is None else tuple(latents.shape[-2:])
        if native is None and (height is None or width is None):
            raise UserError("this checkpoint does not say its size", "Pass height and width.")
        rows, columns = native if isinstance(native, list | tuple) else (native, native)
        height = rows * self.vae_scale_factor if height is None else height
        return height, columns * self.vae_scale_factor if width is None else width

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        sigmas: list[float] | None = None,
        guidance_scale: float = 4.0,
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
    ) -> Any:
        """Draw images.

        Args:
            prompt: caption(s); image i * num_images_per_prompt + j is of prompt i. "" means no condition.
            height, width: in pixels, multiples of the autoencoder's factor; default: as trained.
            num_inference_steps: from noise to data; heun evaluates the network twice a step, euler once.
            sigmas: a grid of one's own, decreasing in (0, 1] (1 = noise); overrides the number of steps.
            guidance_scale: 1 is off (and half the cost); more follows the condition harder.
            negative_prompt: what guidance leads away from; default: the learned null.
            num_images_per_prompt: images per prompt or class; of an unconditional checkpoint, all images.
            generator: one for all, or a list with one per image, each of which alone determines its image.
            latents: noise (B, C, h, w) to start from.
            prompt_embeds, negative_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask:
                what ``encode_prompt`` returns, instead of text; without a mask every token counts.
            output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W), both in [0, 1]; "latent", normalised.
            return_dict: False returns the tuple (images,).
            callback_on_step_end: called as (pipe, i, timestep, tensors) after step i, which began at
                ``timestep`` as diffusers counts it, 1000 (1 - t). What it returns under the same names
                replaces the tensors.
            callback_on_step_end_tensor_inputs: those it gets, of latents (the default), prompt_embeds and
                negative_prompt_embeds.
            max_sequence_length: tokens per prompt; default: the tokenizer's own limit.
            class_labels: class name(s), id(s) or a mixture.
            guidance_interval: guide only while t is in it (t = 0 noise, t = 1 data).
            solver: a key of ``latentflow.flow.SOLVERS``; default: ``pipe.scheduler`` if set, else heun
                (exponential-adams for a network that predicts the data).

        Returns:
            ``ImagePipelineOutput`` with ``images``, or the tuple.

        Raises:
            UserError: see ``check_inputs``; also unknown solvers, bad grids, values that are not finite.
        """
        wanted = callback_on_step_end_tensor_inputs or ["latents"]
        height, width = self._size(height, width, latents)
        self.check_inputs(
            prompt,
            height,
            width,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            class_labels,
            wanted,
        )
        self._check_output_type(output_type)
        self._guidance_scale, self._guidance_interval = guidance_scale, guidance_interval
        self._interrupt = False
        device = self._execution_device

        # 1. The condition, one row per image
        prompt_embeds, negative_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask = (
            self.encode_prompt(
                prompt,
                negative_prompt,
                self.do_classifier_free_guidance,
                num_images_per_prompt,
                device,
                prompt_embeds,
                negative_prompt_embeds,
                prompt_attention_mask,
                negative_prompt_attention_mask,
                max_sequence_length,
            )
        )
        ids = None if class_labels is None else self.class_ids(class_labels)
        ids = None if ids is None else [number for number in ids for _ in range(num_images_per_prompt)]
        batch = _batch_size(num_images_per_prompt, prompt_embeds, ids)

        def bound() -> Velocity:
            positive = self.condition(ids, prompt_embeds, prompt_attention_mask)
            if positive is None or negative_prompt_embeds is None:
                return self.velocity(positive, positive and positive.unconditional())
            negative = self.condition(ids, negative_prompt_embeds, negative_prompt_attention_mask)
            return self.velocity(positive, negative)

        # 2. The noise
        channels = self.transformer.config.in_channels
        latents = self.prepare_latents(
            batch, channels, height, width, torch.float32, device, generator, latents
        )

        # 3. From noise to data
        velocity = bound()

        def after_step(i: int, timestep: Tensor, x: Tensor) -> Tensor:
            nonlocal prompt_embeds, negative_prompt_embeds, velocity
            if callback_on_step_end is None:
                return x
            tensors = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
            tensors["latents"] = x
            changed = callback_on_step_end(self, i, timestep, {name: tensors[name] for name in wanted}) or {}
            if "prompt_embeds" in changed or "negative_prompt_embeds" in changed:
                prompt_embeds = changed.get("prompt_embeds", prompt_embeds)
                negative_prompt_embeds = changed.get("negative_prompt_embeds", negative_prompt_embeds)
                velocity = bound()
            replacement: Tensor = changed.get("latents", x)
            return replacement

        latents = self.follow(
            lambda x, t: velocity(x, t),  # looked up at each call: a callback may have changed it
            latents,
            num_inference_steps,
            sigmas,
            solver,
            generator,
            after_step,
        )

        # 4. From latents to images
        images = self._output(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _batch_size(images_per_prompt: int, prompt_embeds: Tensor | None, class_ids: list[int] | None) -> int:
    rows = {len(value) for value in (prompt_embeds, class_ids) if value is not None}
    if len(rows) > 1:
        raise UserError(
            f"the numbers of prompts and class_labels differ: {sorted(rows)}", "Pass as many of each."
        )
    return rows.pop() if rows else images_per_prompt
