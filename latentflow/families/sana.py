"""Sana (Xie et al. 2024, arXiv:2410.10629)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .model import Values
from .pretrained import FixedShiftModel


class SanaModel(FixedShiftModel):
    """Flow model of Sana. Its rows have embeds (B, L, D) and mask (B, L).

    An instruction stands before a prompt, but not before a negative one.
    """

    prompt_options = ("max_sequence_length", "clean_caption", "complex_human_instruction")

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, mask, _, _ = self.pipeline.encode_prompt(prompts, False, **options)
        return {"embeds": embeds, "mask": mask}

    def embed_negative(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        *_, embeds, mask = self.pipeline.encode_prompt([""] * len(prompts), True, prompts, **options)
        return {"embeds": embeds, "mask": mask}

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Evaluate the network; see `FlowModel.predict`."""
        output: Tensor = self.evaluate(
            x,
            encoder_hidden_states=condition["embeds"],
            encoder_attention_mask=condition["mask"],
            timestep=1000.0 * (1.0 - t) * self.network.config.timestep_scale,
        )
        return -output[:, : x.shape[1]]  # the rest is a learned variance
