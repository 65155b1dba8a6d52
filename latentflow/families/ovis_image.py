"""Ovis-Image (Wang et al. 2025, arXiv:2511.22982)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .model import Values
from .pretrained import PackedModel


class OvisImageModel(PackedModel):
    """Flow model of Ovis-Image. Its rows have embeds (B, L, D), zero where there is no token."""

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        return {"embeds": self.pipeline.encode_prompt(prompts, None, False, **options)[0]}

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        pipeline, embeds = self.pipeline, condition["embeds"]
        _, txt_ids = pipeline._prepare_prompt_embeds(None, embeds, 1, embeds.shape[1], x.device)
        output = self.evaluate(
            hidden_states=self.pack(x),
            timestep=1.0 - t,
            encoder_hidden_states=embeds,
            txt_ids=txt_ids,
            img_ids=pipeline._prepare_latent_image_ids(
                len(x), x.shape[2] // 2, x.shape[3] // 2, x.device, txt_ids.dtype
            ),
        )
        return -self.unpack(output, x)
