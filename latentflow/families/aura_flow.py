"""AuraFlow (Fal 2024)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .model import Values
from .pretrained import FixedShiftModel
from .training_defaults import documented


class AuraFlowModel(FixedShiftModel):
    """Flow model of AuraFlow. Its rows have embeds (B, L, D), zero where there is no token."""

    patch = 2
    documented_training = documented("SimpleTuner's AURAFLOW.md", learning_rate=4e-5)

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        return {"embeds": self.pipeline.encode_prompt(prompts, None, False, **options)[0]}

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        output: Tensor = self.evaluate(x, encoder_hidden_states=condition["embeds"], timestep=1.0 - t)
        return -output
