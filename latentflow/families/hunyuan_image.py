"""HunyuanImage 2.1 (Tencent Hunyuan 2025)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .model import Values
from .pretrained import PretrainedModel


class HunyuanImageModel(PretrainedModel):
    """Flow model of HunyuanImage. Its rows have embeds (B, L, D), mask (B, L), and glyphs of quoted text with theirs.

    Guidance is classifier-free. The pipeline's guider does the same in its first steps; after them it looks back at
    the steps before, which no velocity does. The distilled checkpoint takes its guidance scale as an input, and
    predicts average velocities where its config has ``use_meanflow``.
    """

    guidance_argument = "distilled_guidance_scale"
    prompt_options = ()

    @property
    def embeds_guidance(self) -> bool:  # type: ignore[override]
        """True for the distilled checkpoint."""
        return bool(self.network.config.guidance_embeds)

    @property
    def usual_guidance(self) -> float:
        """Guidance scale of the pipeline's guider; 1 without one."""
        if self.embeds_guidance:
            return float(self.option(self.guidance_argument))
        guider = self.pipeline.guider
        return float(guider.guidance_scale) if guider is not None else 1.0

    def mu(self, steps: int, tokens: int) -> None:
        """Return None: the shift is fixed."""

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        names = ("embeds", "mask", "glyphs", "glyph_mask")
        encoded = self.pipeline.encode_prompt(prompts, batch_size=len(prompts), **options)
        return dict(zip(names, encoded, strict=True))

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Evaluate the network; see `FlowModel.predict`."""
        averaged, guidance = self.network.config.use_meanflow, torch.full_like(t, guidance_scale)
        until = t if end is None else end
        output: Tensor = self.evaluate(
            hidden_states=x,
            timestep=(1000.0 * (1.0 - t)).to(x.dtype),
            timestep_r=(1000.0 * (1.0 - until)).to(x.dtype) if averaged else None,
            encoder_hidden_states=condition["embeds"],
            encoder_attention_mask=condition["mask"],
            encoder_hidden_states_2=condition["glyphs"],
            encoder_attention_mask_2=condition["glyph_mask"],
            guidance=(1000.0 * guidance).to(x.dtype) if self.embeds_guidance else None,
        )
        return -output
