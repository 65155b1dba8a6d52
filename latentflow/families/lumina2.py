"""Lumina-Image 2.0 (Qin et al. 2025, arXiv:2503.21758)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .added_inputs import ExtendableModel
from .model import Values
from .training_defaults import documented


class Lumina2Model(ExtendableModel):
    """Flow model of Lumina-Image 2.0. Its rows have embeds (B, L, D) and mask (B, L).

    A system prompt stands before a prompt, but not before a negative one. Each line of pixels of a guided latent is
    as long as that of the prompt alone.
    """

    prompt_options = ("max_sequence_length", "system_prompt")
    sampling_options = ("cfg_normalization",)
    patch = 2
    first_layer = "x_embedder"
    cells_in_order = True
    documented_training = documented("diffusers' train_dreambooth_lora_lumina2.py")

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, mask, _, _ = self.pipeline.encode_prompt(prompts, False, **options)
        return {"embeds": embeds, "mask": mask}

    def embed_negative(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        *_, embeds, mask = self.pipeline.encode_prompt([""] * len(prompts), True, prompts, **options)
        return {"embeds": embeds, "mask": mask}

    def tokens(self, height: int, width: int) -> int:
        """Return the number that the pipeline takes for its tokens: the channels of the latent."""
        return int(self.network.config.in_channels)

    def adjust_guided(self, guided: Tensor, alone: Tensor) -> Tensor:
        """Give each line the length that it has under the condition alone, if ``cfg_normalization`` is on."""
        if not self.option("cfg_normalization"):
            return guided
        own, new = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (alone, guided))
        adjusted: Tensor = guided * (own / new)
        return adjusted

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        output: Tensor = self.evaluate(
            hidden_states=self.with_extra(x, condition),
            timestep=t,
            encoder_hidden_states=condition["embeds"],
            encoder_attention_mask=condition["mask"],
        )
        return output
