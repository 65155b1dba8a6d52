"""``LatentFlowPipeline``: a diffusers pipeline from a caption, a class or nothing to images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

from torch import Tensor

from ..families.model import Generators, Rows, Size
from .adapter_scale import AdapterScale
from .arguments import ClassLabels, ConditionArguments, StepCallback, checked
from .base import FlowPipeline
from .calls import CallMixin

if TYPE_CHECKING:
    from .images import Images


class GenerateCall(CallMixin):
    """The call of ``LatentFlowPipeline``, whatever flow model it calls."""

    @checked
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
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
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        control_image: Images = None,
        control_scale: float | Mapping[str, float] = 1.0,
        temperature: float = 1.0,
        corrector: float = 0.0,
        like: Images = None,
        **adapters: Unpack[AdapterScale],
    ) -> Any:
        """Draw images.

        Args:
            prompt: caption(s); image i * num_images_per_prompt + j is of prompt i. "" means no condition.
            height, width: in pixels, multiples of the autoencoder's factor; default: as trained, or for
                InstructPix2Pix those of the control image, in whose shape one of them follows from the other.
            num_inference_steps: from noise to data, of one evaluation each. Default: 16, or 4 of a checkpoint of
                average velocities, which draws in 1 to 4; with a solver or a scheduler 20, where heun evaluates the
                network twice a step.
            sigmas: a grid of one's own, decreasing in (0, 1] (1 = noise), in float32 too; overrides the number of
                steps.
            guidance_scale: 1 is off (and half the cost); more follows the condition harder. Default: the
                checkpoint's own (``usual_guidance`` in its config), else 4, of tokens 2; a checkpoint that has learned
                its guidance along takes no other.
            negative_prompt: what guidance leads away from; default: the learned null.
            num_images_per_prompt: images per prompt or class; of an unconditional checkpoint, all images.
            generator: one for all, or a list with one per image, each of which alone determines its image, up to
                rounding: in a batch of another size it may differ by one level of 255.
            latents: noise (B, C, h, w) to start from; of a checkpoint of tokens, whole numbers (B, h, w).
            prompt_embeds, negative_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask:
                instead of text, rows of ``pipe.model.encode_prompt``, which no mask goes with; or, of our own
                checkpoints, what ``pipe.encode_prompt`` returns (without a mask every token counts).
            output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W), both in [0, 1]; "latent", normalised.
            return_dict: False returns the tuple (images,).
            callback_on_step_end: called as (pipe, i, timestep, tensors) after step i, which began at
                ``timestep`` as diffusers counts it, 1000 (1 - t). What it returns under the same names
                replaces the tensors.
            callback_on_step_end_tensor_inputs: those it gets, of latents (the default), prompt_embeds,
                negative_prompt_embeds and prediction (the data that the last evaluation points to: see ``to_images``).
            max_sequence_length: tokens per prompt; default: the tokenizer's own limit.
            class_labels: class name(s), id(s) or a mixture.
            guidance_interval: guide only while t is in it (t = 0 noise, t = 1 data).
            solver: a key of ``latentflow.flow.SOLVERS``, or "scheduler": ``pipe.scheduler``, or else the own scheduler
                of a pretrained model, steps as in its stock pipeline; or "tuned", see `latentflow tune-sampler`. Of a
                checkpoint of tokens: a key of ``latentflow.flow.discrete.SAMPLERS``, by default "exact".
                Default: ``pipe.scheduler`` if set, else what was tuned for so many steps, this guidance scale and size,
                else exponential-adams with shorter steps at both ends (average velocities, of which a solver sees the
                velocities only, where the checkpoint predicts them).
            original_size, crops_coords_top_left, target_size: (height, width) or (top, left) in pixels, for checkpoints
                trained with ``--size-conditioning``: an image that was so large and cropped there. Default: of the
                size that is drawn, uncropped.
            control_image: for checkpoints that draw under an image (edges, depth, what is to be edited): a PIL image,
                an array ((B,) H, W, 3) or a tensor ((B,) 3, H, W) in [0, 1], resized to what is drawn. One for all
                prompts, or one for each. Pretrained checkpoints of this kind need one; ours, trained with
                ``--control``, draw without as well, and take label maps where they were trained with them: PIL images
                (palettes or ids, 255 = no label), or whole numbers ((B,) H, W); resized to the nearest pixel. Of a
                checkpoint that takes both: {"image": ..., "labels": ...}.
            control_scale: guidance over the control image, for checkpoints that draw without as well: v(without) +
                control_scale (v(with) - v(without)), under every prompt, before the guidance over prompts. 1: as it
                was trained; 0: without; more follows it harder. Values but these two double the evaluations. Of both
                kinds: {"image": 1.5, "labels": 0.5}, or one of the two, where the other counts as 1; scales that
                differ triple the evaluations.
            temperature: of checkpoints of tokens: divides the logits; below 1 likely tokens are drawn more
                often.
            corrector: of checkpoints of tokens: how many times each token is drawn again on the way, on average.
            like: of checkpoints with a latent variable (``--latent-variable``): an image, as ``control_image``, whose
                variations are drawn; one for all prompts, or one for each. Without, the variable is drawn from its
                prior, by the image's generator before its noise.
            joint_attention_kwargs, attention_kwargs, cross_attention_kwargs: ``{"scale": s}`` multiplies the weights of
                all loaded adapters by s during this call, as ``set_adapters`` does for all that follow. The three
                mean the same, and are the names that diffusers' pipelines have for it.

        Returns:
            ``ImagePipelineOutput`` with ``images``, or the tuple.

        Raises:
            UserError: an argument that cannot work, before anything is computed (see ``CHECKS`` in
                ``pipeline/arguments.py`` and ``check_inputs``); more images than the machine has memory for; values on
                the way that are not finite, with the part that made them and the step. An autoencoder that overflows in
                half precision is used in float32 instead, which is logged once.

        Warns:
            UnknownWords: once, of words that the checkpoint's vocabulary does not know; see ``unknown_words``.
        """
        height, width = self.image_size(height, width, latents, control_image)
        # 1. The condition, one row per image
        call = self.start_call(ConditionArguments.of(locals()), height, width)
        # 2. The noise
        noise = self.prepare_noise(len(call.rows), height, width, generator, latents)
        # 3. From noise to data
        latents = self.sample(
            call.velocity, noise, num_inference_steps, sigmas, solver, generator, call.after_step
        )
        # 4. From latents to images
        return self.finish_call(self.to_images(latents, output_type), return_dict)


class LatentFlowPipeline(GenerateCall, FlowPipeline):
    """Draw images: integrate a learned velocity from noise (t = 0) to data (t = 1).

    Open one with ``LatentFlowPipeline.from_pretrained(folder_or_hub_id)``; components: see ``FlowPipeline``.
    """

    call = GenerateCall
