"""The conditions of a call: its arguments checked against one another and encoded, one row per image."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import UserError, few
from ..families.model import Generators, Size
from ..models.text import UnknownWords, unknown_words
from ..utils.memory import require_memory
from .arguments import labels, texts
from .sampling import RunningCall, SamplingMixin, StepCallback, from_model

log = logging.getLogger(__name__)

ClassLabels: TypeAlias = int | str | Sequence[int | str]
# An image while it is drawn, at least: three channels in float32.
_PIXEL_BYTES = 12


#: arguments of a pipeline's call that `ConditionMixin.start_call` takes as they are
CONDITION_ARGUMENTS = (
    "guidance_scale",
    "prompt",
    "negative_prompt",
    "num_images_per_prompt",
    "prompt_embeds",
    "negative_prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_attention_mask",
    "max_sequence_length",
    "class_labels",
    "guidance_interval",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "original_size",
    "crops_coords_top_left",
    "target_size",
    "generator",
    "latents",
)


def condition_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return `CONDITION_ARGUMENTS` among the arguments of a call, by name."""
    return {name: arguments[name] for name in CONDITION_ARGUMENTS if name in arguments}


def unknown_words_text(words: Sequence[str]) -> str:
    """Return a sentence for users that names the words; see ``ConditionMixin.unknown_words``."""
    named = few([f"'{word}'" for word in words], 10)
    return f"words that the checkpoint's vocabulary does not know, and that it cannot draw: {named}"


class ConditionMixin(SamplingMixin):
    """The arguments that say what is drawn, for our pipelines."""

    text_encoder: Any
    tokenizer: Any
    _execution_device: torch.device
    takes_text = from_model("takes_text")
    takes_classes = from_model("takes_classes")
    takes_masks = from_model("takes_masks")
    labels = from_model("labels")

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Return class ids of class names; see ``class_ids``."""
        return self.model.class_ids([label] if isinstance(label, str) else label)

    def class_ids(self, class_labels: ClassLabels) -> list[int]:
        """Return class ids of names, ids or a mixture.

        Raises:
            UserError: a name is unknown (the nearest is suggested), or an id, or there are no names.
        """
        given = labels("class_labels", class_labels)
        return self.model.class_ids(given if isinstance(given, list) else [given])

    def unknown_words(self, prompts: str | list[str]) -> list[str]:
        """Return words of prompts that the checkpoint's vocabulary does not know, each once: they cannot be drawn.

        None without a tokenizer, or with one that spells everything in bytes.
        """
        if self.tokenizer is None:
            return []
        return unknown_words(self.tokenizer, [prompts] if isinstance(prompts, str) else prompts)

    def warn_of_unknown_words(self, *prompts: str | list[str] | None, stacklevel: int = 2) -> None:
        """Warn once of all `unknown_words` of ``prompts``, as ``UnknownWords``."""
        rows = [[text] if isinstance(text, str) else text or [] for text in prompts]
        if words := self.unknown_words([text for row in rows for text in row]):
            warnings.warn(UnknownWords(unknown_words_text(words)), stacklevel=stacklevel + 1)

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return token embeddings of prompts, each repeated ``num_images_per_prompt`` times in place: a, a, b, b.

        An empty prompt becomes a row without tokens (mask all False), which means the learned null. Without a
        negative prompt the negative tensors are None, and guidance starts from that same null.

        Returns:
            prompt_embeds (B, L, D), negative_prompt_embeds (B, L', D), prompt_attention_mask (B, L) bool,
            negative_prompt_attention_mask (B, L') bool; None for what is not there.

        Raises:
            UserError: no text encoder is loaded, or the numbers of prompts and negative prompts differ.
        """
        device = device or self._execution_device

        def encoded(name: str, text: Any, embeds: Tensor | None, mask: Tensor | None, count: int) -> Any:
            if text is not None:
                rows = texts(name, text)
                prompts = [rows] * count if isinstance(rows, str) else rows
                embeds, mask = self.model.embed_text(prompts, max_sequence_length)
            if embeds is None:
                return None, None
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.to(torch.bool)
            return embeds.to(device), mask.to(device)

        embeds, mask = encoded("prompt", prompt, prompt_embeds, prompt_attention_mask, 1)
        negative, negative_mask, count = None, None, 0 if embeds is None else len(embeds)
        if negative_prompt is not None:
            texts("negative_prompt", negative_prompt)
        if do_classifier_free_guidance:
            negative, negative_mask = encoded(
                "negative_prompt",
                negative_prompt,
                negative_prompt_embeds,
                negative_prompt_attention_mask,
                count,
            )
        if negative is not None and len(negative) != count:
            raise UserError(
                f"{len(negative)} negative prompts for {count} prompts",
                "Pass one negative prompt for all, or one for each prompt.",
            )
        each = (embeds, negative, mask, negative_mask)
        first, second, third, fourth = (
            None if value is None else value.repeat_interleave(num_images_per_prompt, 0) for value in each
        )
        return first, second, third, fourth

    def start_call(
        self,
        *,
        height: int,
        width: int,
        images: int = 1,
        guidance_scale: float | None = None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
        class_labels: ClassLabels | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
    ) -> RunningCall:
        """Check how the arguments fit one another and encode the condition, one row per image.

        Args:
            height, width: in pixels, of what is drawn.
            images: how many images the call brings; one prompt serves them all, and one image all prompts.
                Row i * num_images_per_prompt + j is of prompt i and image i.
            guidance_scale: None is the usual one.
            original_size, crops_coords_top_left, target_size: the condition of a network that takes sizes; by default
                that of an image of this size of which nothing was cut off.
            generator, latents: checked only, where they are one for each row.

        Raises:
            UserError: before anything is computed: a size that the autoencoder cannot make (the nearest is named), a
                condition that is missing or that the checkpoint does not take; arguments that exclude one another, or
                numbers of prompts, classes, images and generators that do not fit; more images than the machine has
                memory for.
        """
        model, unit = self.model, self.model.size_multiple
        for what, size in (("height", height), ("width", width)):
            if size <= 0 or size % unit:
                valid = max(1, round(size / unit)) * unit
                raise UserError(f"{what} {size} is not a multiple of {unit}", f"The nearest is {valid}.")
        given = (
            ("prompt", prompt, prompt_embeds, prompt_attention_mask),
            ("negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask),
        )
        for name, text, embeds, mask in given:
            if text is not None and embeds is not None:
                raise UserError(f"both {name} and {name}_embeds are given", "Pass one of them.")
            if mask is not None and (embeds is None or mask.shape != embeds.shape[:2]):
                shape = None if embeds is None else tuple(embeds.shape)
                raise UserError(
                    f"{name}_attention_mask has shape {tuple(mask.shape)}, {name}_embeds {shape}",
                    "Pass both as encode_prompt returns them: (B, L) and (B, L, D).",
                )
        model.check_condition(
            prompt if prompt_embeds is None else prompt_embeds,
            negative_prompt if negative_prompt_embeds is None else negative_prompt_embeds,
            class_labels,
        )
        for name, _, embeds, _ in given:
            if embeds is not None and embeds.shape[-1] != model.text_width:
                raise UserError(
                    f"{name}_embeds has shape {tuple(embeds.shape)}",
                    f"The network takes (B, L, {model.text_width}).",
                )
        limit = getattr(getattr(self.text_encoder, "config", None), "max_position_embeddings", None)
        if limit is not None and (max_sequence_length or 0) > limit:
            raise UserError(
                f"max_sequence_length is {max_sequence_length}", f"The text encoder takes {limit} tokens."
            )
        ids = None if class_labels is None else self.class_ids(class_labels)
        prompts = _number(prompt, prompt_embeds)
        negatives = (
            None if isinstance(negative_prompt, str) else _number(negative_prompt, negative_prompt_embeds)
        )
        if negatives is not None and negatives != prompts:
            raise UserError(
                f"{negatives} negative prompts for {prompts or 0} prompts",
                "Pass one negative prompt for all, or one for each prompt.",
            )
        count = count_rows(num_images_per_prompt, prompts, None if ids is None else len(ids), images)
        self.require_room(count, height, width)
        self.check_noise(count, height, width, generator, latents)

        self._guidance_scale, self._interrupt = model.guidance(guidance_scale), False
        if guidance_scale not in (None, self._guidance_scale, model.few_steps.folded_guidance):
            scales = (guidance_scale, model.few_steps.folded_guidance)
            log.warning(
                "guidance_scale %g is left out: the checkpoint has learned guidance %g along", *scales
            )
        embeds, negative_embeds, mask, negative_mask = self.encode_prompt(
            prompt,
            negative_prompt,
            self.do_classifier_free_guidance,
            1,
            self._execution_device,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
            max_sequence_length,
        )
        rows = model.rows(ids, embeds, mask)
        places = [row for row in range(len(rows)) for _ in range(num_images_per_prompt)]
        places *= count // len(places)
        negative = (
            None if negative_embeds is None else model.rows(ids, negative_embeds, negative_mask)[places]
        )
        drawn = height, width
        rows = model.with_sizes(
            rows[places], original_size or drawn, crops_coords_top_left, target_size or drawn, drawn
        )
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        return RunningCall(self, rows, negative, *callback, guidance_interval)

    def require_room(self, count: int, height: int, width: int) -> None:
        """Refuse more pixels than this machine has memory for.

        Raises:
            UserError: says how much there is.
        """
        require_memory(f"{count} images of {width} x {height} pixels", count * width * height * _PIXEL_BYTES)

    def check_noise(
        self, count: int, height: int, width: int, generator: Generators | None, latents: Tensor | None
    ) -> None:
        """Refuse generators, or latents to start from, that do not fit ``count`` images.

        Raises:
            UserError: as many as there are, or their shape or device.
        """
        if isinstance(generator, list) and len(generator) != count:
            raise UserError(
                f"{len(generator)} generators for {count} images",
                "Pass one for each image (prompts x num_images_per_prompt), or a single one.",
            )
        shape = (count, *self.model.latent_shape(height, width))
        if latents is not None and tuple(latents.shape) != shape:
            raise UserError(f"latents have shape {tuple(latents.shape)}", f"For these inputs it is {shape}.")
        device = self._execution_device.type
        for given in [generator] if isinstance(generator, torch.Generator) else generator or []:
            if given.device.type not in ("cpu", device):
                raise UserError(
                    f"a generator is on {given.device}, the pipeline on {device}",
                    "Make it on the CPU, where the same seed is the same noise everywhere: torch.Generator().",
                )


def _number(text: str | list[str] | None, embeds: Tensor | None) -> int | None:
    """Return the number of prompts that are given; None = none."""
    if text is None:
        return None if embeds is None else len(embeds)
    return 1 if isinstance(text, str) else len(text)


def count_rows(images_per_prompt: int, prompts: int | None, classes: int | None, images: int) -> int:
    """Return the rows of a call: prompts (or classes) x images_per_prompt; one prompt serves any number of images.

    Args:
        prompts, classes: how many are given; None = none.

    Raises:
        UserError: the numbers of prompts, classes and images do not fit one another.
    """
    given = {count for count in (prompts, classes) if count is not None}
    if len(given) > 1:
        raise UserError(
            f"the numbers of prompts and class_labels differ: {sorted(given)}", "Pass as many of each."
        )
    count = given.pop() if given else 1
    if 1 not in (count, images) and count != images:
        raise UserError(
            f"{count} prompts or classes for {images} images", "Pass as many of each, or one of either."
        )
    return max(count, images) * images_per_prompt
