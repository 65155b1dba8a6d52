"""Lumina-Next (Zhuo et al. 2024, arXiv:2406.18583)."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import Tensor

from .model import Values
from .pretrained import FixedShiftModel


class LuminaModel(FixedShiftModel):
    """Flow model of Lumina-Next. Its rows have embeds (B, L, D) and mask (B, L).

    Guidance acts on the first three channels of the latent only.
    """

    prompt_options = ("clean_caption",)
    sampling_options = ("scaling_watershed", "proportional_attn")
    patch = 2

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, mask, _, _ = self.pipeline.encode_prompt(prompts, False, **options)
        return {"embeds": embeds, "mask": mask}

    def adjust_guided(self, guided: Tensor, alone: Tensor) -> Tensor:
        """Leave all channels but three as they are under the condition alone."""
        return torch.cat([guided[:, :3], alone[:, 3:]], dim=1)

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        factor, native = self.pipeline.vae_scale_factor, self.pipeline.default_image_size
        stretch = math.sqrt(x.shape[2] * x.shape[3]) * factor / native
        early = float(t.max()) < self.option("scaling_watershed")
        places = get_2d_rotary_pos_embed_lumina(
            self.network.head_dim,
            384,
            384,
            linear_factor=stretch if early else 1.0,
            ntk_factor=1.0 if early else stretch,
        )
        attention = {"base_sequence_length": (native // 16) ** 2} if self.option("proportional_attn") else {}
        output: Tensor = self.evaluate(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=condition["embeds"],
            encoder_mask=condition["mask"],
            image_rotary_emb=places,
            cross_attention_kwargs=attention,
        )
        return output[:, : x.shape[1]]  # the rest is a learned variance
