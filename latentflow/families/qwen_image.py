"""Qwen-Image (Wu et al. 2025, arXiv:2508.02324)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .model import Values
from .pretrained import PackedModel


class QwenImageModel(PackedModel):
    """Flow model of Qwen-Image. Its rows have embeds (B, L, D) and mask (B, L) bool.

    Guided tokens are as long as those of the prompt alone.
    """

    guidance_argument = "true_cfg_scale"

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, mask = self.pipeline.encode_prompt(prompts, **options)
        if mask is None:  # no prompt is shorter than another
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return {"embeds": embeds, "mask": mask.bool()}

    def adjust_guided(self, guided: Tensor, alone: Tensor) -> Tensor:
        """Give each guided token the length that it has under the condition alone."""
        return guided * (self.token_lengths(alone) / self.token_lengths(guided))

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Evaluate the network; see `FlowModel.predict`."""
        output = self.evaluate(
            hidden_states=self.pack(x),
            timestep=1.0 - t,
            encoder_hidden_states=condition["embeds"],
            encoder_hidden_states_mask=condition["mask"],
            img_shapes=[[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x),
        )
        return -self.unpack(output, x)
