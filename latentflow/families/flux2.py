"""FLUX.2 dev and klein (Black Forest Labs 2025)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor

from .model import Values
from .pretrained import PretrainedModel


class Flux2Model(PretrainedModel):
    """Flow model of FLUX.2. Its rows have embeds (B, L, D).

    FLUX.2 dev takes its guidance scale as an input, klein has classifier-free guidance, and none where it is
    step-distilled.
    """

    prompt_options = ("max_sequence_length", "text_encoder_out_layers")

    @property
    def embeds_guidance(self) -> bool:  # type: ignore[override]
        """True for FLUX.2 dev."""
        return bool(self.network.config.guidance_embeds)

    def guidance(self, scale: float | None) -> float:
        """Return the guidance scale; a distilled checkpoint does without."""
        return 1.0 if self.pipeline.config.get("is_distilled") else super().guidance(scale)

    def mu(self, steps: int, tokens: int) -> float | None:
        """Return the shift, which depends on the number of steps as well."""
        return float(compute_empirical_mu(tokens, steps))

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        return {"embeds": self.pipeline.encode_prompt(prompts, **options)[0]}

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Evaluate the network; see `FlowModel.predict`."""
        pipeline, embeds = self.pipeline, condition["embeds"]
        output: Tensor = self.evaluate(
            hidden_states=pipeline._pack_latents(x),
            timestep=1.0 - t,
            guidance=torch.full_like(t, guidance_scale) if self.embeds_guidance else None,
            encoder_hidden_states=embeds,
            txt_ids=pipeline._prepare_text_ids(embeds).to(x.device),
            img_ids=pipeline._prepare_latent_ids(x).to(x.device),
        )
        return -output.transpose(1, 2).reshape(x.shape)
