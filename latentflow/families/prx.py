"""PRX (Photoroom 2025)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .model import Values
from .pretrained import FixedShiftModel


class PRXModel(FixedShiftModel):
    """Flow model of PRX. Its rows have embeds (B, L, D) and mask (B, L) bool."""

    opens_whole = True
    prompt_options = ("tokenizer_max_length", "skip_text_cleaning")

    @property
    def patch(self) -> int:  # type: ignore[override]
        """Cells of the latent that make one token, along a side."""
        return int(self.network.config.patch_size)

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, mask, _, _ = self.pipeline.encode_prompt(prompts, None, False, **options)
        return {"embeds": embeds, "mask": mask}

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        output: Tensor = self.evaluate(
            hidden_states=x,
            timestep=1.0 - t,
            encoder_hidden_states=condition["embeds"],
            attention_mask=condition["mask"],
        )
        return -output
