"""Krea 2 (Krea 2026)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .model import Values
from .pretrained import PackedModel
from .training_defaults import documented


class Krea2Model(PackedModel):
    """Flow model of Krea 2. Its rows have embeds (B, L, layers, D) and mask (B, L) bool.

    Its guidance scale s means v + s (v - v_negative), which is 1 + s elsewhere; 0 is none.
    """

    unguided = 0.0
    documented_training = documented("diffusers' README_krea2.md", lora_rank=32, learning_rate=3e-4)

    def true_guidance(self, scale: float) -> float:
        """Return the scale as classifier-free guidance counts it."""
        return 1.0 + scale

    def guidance(self, scale: float | None) -> float:
        """Return the guidance scale; a distilled checkpoint does without unless it is asked for."""
        return 0.0 if scale is None and self.pipeline.config.is_distilled else super().guidance(scale)

    def mu(self, steps: int, tokens: int) -> float | None:
        """Return the shift, a fixed one for distilled checkpoints."""
        return 1.15 if self.pipeline.config.is_distilled else super().mu(steps, tokens)

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, mask = self.pipeline.encode_prompt(prompts, **options)
        return {"embeds": embeds, "mask": mask}

    def unpack(self, tokens: Tensor, like: Tensor) -> Tensor:
        factor = self.pipeline.vae_scale_factor
        size = like.shape[2] * factor, like.shape[3] * factor
        unpacked: Tensor = self.pipeline._unpack_latents(tokens, *size)
        return unpacked.reshape(like.shape)

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        embeds = condition["embeds"]
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        output = self.evaluate(
            hidden_states=self.pack(x),
            encoder_hidden_states=embeds,
            timestep=1.0 - t,
            position_ids=self.pipeline.prepare_position_ids(embeds.shape[1], rows, columns, x.device),
            encoder_attention_mask=condition["mask"],
        )
        return -self.unpack(output, x)
