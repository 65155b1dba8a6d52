"""Z-Image (Z-Image Team 2025, arXiv:2511.22699)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .added_inputs import ExtendableModel
from .model import Values
from .training_defaults import documented


class ZImageModel(ExtendableModel):
    """Flow model of Z-Image. Its rows have embeds, a list of B tensors (L, D) of different lengths.

    Its guidance scale s means v + s (v - v_negative), which is 1 + s elsewhere; 0 is none.
    """

    patch = 2
    first_layer: str | None = "all_x_embedder.2-1"
    cells_in_order = True
    unguided = 0.0
    documented_training = documented("diffusers' train_dreambooth_lora_z_image.py", posterior="mode")

    def true_guidance(self, scale: float) -> float:
        """Return the scale as classifier-free guidance counts it."""
        return 1.0 + scale

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, _ = self.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, **options)
        return {"embeds": embeds}

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        output: list[Tensor] = self.evaluate(
            [*self.with_extra(x, condition).unsqueeze(2).unbind()], t, condition["embeds"]
        )
        return torch.stack(output).squeeze(2)


class ZImageOmniModel(ZImageModel):
    """Flow model of Z-Image-Omni, without images in its prompts. Its rows are those of Z-Image."""

    first_layer = None

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False, **options
        )
        return {"embeds": [parts[0] for parts in embeds]}

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        output: list[Tensor] = self.evaluate(
            x=[[image] for image in x.unsqueeze(2)],
            t=t,
            cap_feats=[[row] for row in condition["embeds"]],
            siglip_feats=[None] * len(x),
            image_noise_mask=[[1]] * len(x),
        )
        return torch.stack(output).squeeze(2)
