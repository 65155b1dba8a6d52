"""Prompts and classes of a call to one of our own checkpoints, as diffusers' tensors and as rows of conditions."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..errors import UserError, plural
from ..families.latentflow import LatentFlowModel
from ..families.model import Rows, Size
from .adapter_scale import scaled_adapters
from .arguments import ConditionArguments, check_embeds, checked
from .calls import CallMixin


class PromptMixin(CallMixin):
    """Encoding of prompts for our own checkpoints."""

    model: LatentFlowModel

    @checked
    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: Tensor | Rows | None = None,
        negative_prompt_embeds: Tensor | Rows | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
        lora_scale: float | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return four tensors of token embeddings and masks, as diffusers' pipelines do; `FlowModel.encode_prompt`
        returns rows instead.

        Each prompt is repeated ``num_images_per_prompt`` times in place: a, a, b, b. An empty prompt becomes a row
        without tokens (mask all False), which means the learned null. Without a negative prompt the negative tensors
        are None, and guidance starts from that same null.

        Args:
            device: of the four; default: the one that computes.
            lora_scale: by which the weights of adapters are multiplied meanwhile, as by a call's
                ``joint_attention_kwargs={"scale": ...}``.

        Returns:
            prompt_embeds (B, L, D), negative_prompt_embeds (B, L', D), prompt_attention_mask (B, L) bool,
            negative_prompt_attention_mask (B, L') bool; None for what is not there.

        Raises:
            UserError: an argument that cannot work (see ``CHECKS`` in ``pipeline/arguments.py``); no text encoder is
                loaded, or the numbers of prompts and negative prompts differ.
        """
        device, settings = device or self._execution_device, (max_sequence_length, lora_scale)
        prompt_embeds, prompt_attention_mask = self._encoded(
            "prompt", prompt, prompt_embeds, prompt_attention_mask, 1, *settings
        )
        count = 0 if prompt_embeds is None else len(prompt_embeds)
        if do_classifier_free_guidance:
            negative = negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask
            negative_prompt_embeds, negative_prompt_attention_mask = self._encoded(
                "negative_prompt", *negative, count, *settings
            )
        else:
            negative_prompt_embeds = negative_prompt_attention_mask = None
        if negative_prompt_embeds is not None and len(negative_prompt_embeds) != count:
            if len(negative_prompt_embeds) != 1 or count == 0:
                raise UserError(
                    f"{plural(len(negative_prompt_embeds), 'negative prompt')} for {plural(count, 'prompt')}",
                    "Pass one negative prompt for all, or one for each prompt.",
                )
            negative_prompt_embeds = negative_prompt_embeds.expand(count, -1, -1)
            assert negative_prompt_attention_mask is not None
            negative_prompt_attention_mask = negative_prompt_attention_mask.expand(count, -1)
        each = prompt_embeds, negative_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask
        prompt_embeds, negative_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask = (
            None if value is None else value.repeat_interleave(num_images_per_prompt, 0).to(device)
            for value in each
        )
        return prompt_embeds, negative_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask

    def _encoded(
        self,
        name: str,
        text: str | list[str] | None,
        embeds: Tensor | Rows | None,
        mask: Tensor | None,
        count: int,
        max_sequence_length: int | None,
        lora_scale: float | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return embeddings and mask of prompts, or those that are given; both None without any.

        Args:
            name: of the argument, for errors.
            count: of prompts that a single text stands for.
        """
        check_embeds(self.model, name, text, embeds, mask)
        if text is not None:
            with scaled_adapters(self, 1.0 if lora_scale is None else lora_scale):
                prompts = [text] * max(1, count) if isinstance(text, str) else text
                return self.model.embed_text(prompts, max_sequence_length)
        if embeds is None:
            return None, None
        if isinstance(embeds, Rows):
            if "text" not in embeds.values:
                raise UserError(
                    f"{name}_embeds are rows without a prompt", "Encode prompts: model.encode_prompt."
                )
            return cast(Tensor, embeds.values["text"]), cast(Tensor, embeds.values["text_mask"])
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.to(torch.bool)

    def encode_rows(self, asked: ConditionArguments, count: int, drawn: Size) -> tuple[Rows, Rows | None]:
        """Return the conditions of a call; see `SamplingMixin.encode_rows`."""
        model = self.model
        embeds, negative_embeds, mask, negative_mask = self.encode_prompt(
            asked.prompt,
            asked.negative_prompt,
            self.do_classifier_free_guidance,
            1,
            self._execution_device,
            asked.prompt_embeds,
            asked.negative_prompt_embeds,
            asked.prompt_attention_mask,
            asked.negative_prompt_attention_mask,
            asked.max_sequence_length,
        )
        ids = None if asked.class_labels is None else self.class_ids(asked.class_labels)
        rows = model.rows(ids, embeds, mask)
        places = [row for row in range(len(rows)) for _ in range(asked.num_images_per_prompt)]
        places *= count // len(places)
        negative = (
            None if negative_embeds is None else model.rows(ids, negative_embeds, negative_mask)[places]
        )
        rows = model.with_sizes(
            rows[places],
            asked.original_size or drawn,
            asked.crops_coords_top_left,
            asked.target_size or drawn,
            drawn,
        )
        return rows, negative
