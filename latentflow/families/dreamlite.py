"""DreamLite (2026), a small network, and its distilled version for phones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Values
from .pretrained import PretrainedModel


class DreamLiteModel(PretrainedModel):
    """Flow model of DreamLite. Its rows have embeds (B, L, D) and mask (B, L).

    Its network sees an image beside the latent: none. The distilled checkpoint has no guidance.
    """

    patch = 2

    @property
    def network(self) -> Any:
        return self.pipeline.unet

    def guidance(self, scale: float | None) -> float:
        """Return the guidance scale; a distilled checkpoint does without."""
        return 1.0 if self.option(self.guidance_argument) is None else super().guidance(scale)

    @property
    def usual_guidance(self) -> float:
        return float(self.option(self.guidance_argument) or 1.0)

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        return self.embed_negative([f"[Generate]: {text}" for text in prompts], **options)

    def embed_negative(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        dtype = self.pipeline.text_encoder.dtype
        embeds, mask = self.pipeline.encode_prompt("generate", prompts, self.device, dtype, **options)
        return {"embeds": embeds, "mask": mask}

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        factor, width = self.pipeline.vae_scale_factor, x.shape[3]
        size = torch.tensor([[width * factor, x.shape[2] * factor]], device=x.device, dtype=x.dtype)
        output: Tensor = self.evaluate(
            F.pad(x, (0, width)),
            timestep=1000.0 * (1.0 - t),
            encoder_hidden_states=condition["embeds"],
            encoder_attention_mask=condition["mask"],
            added_cond_kwargs={"time_ids": size.expand(len(x), 2)},
        )
        return -output[..., :width]
