"""HiDream-I1 (Cai et al. 2025, arXiv:2505.22705)."""

from __future__ import annotations

from typing import Any

from diffusers.pipelines.hidream_image.pipeline_hidream_image import calculate_shift
from torch import Tensor

from .model import Values
from .pretrained import PretrainedModel
from .training_defaults import documented


class HiDreamModel(PretrainedModel):
    """Flow model of HiDream-I1. Its rows have t5 (B, L, D), llama (B, layers, L, D') and pooled (B, D'')."""

    patch = 2
    documented_training = documented("diffusers' README_hidream.md", learning_rate=2e-4)

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        t5, _, llama, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, **options
        )
        return {"t5": t5, "llama": llama.transpose(0, 1), "pooled": pooled}

    def sigmas(self, steps: int) -> None:
        """Leave the noise levels to the scheduler."""

    def mu(self, steps: int, tokens: int) -> float:
        """Return the shift of the longest sequence that the network takes."""
        return float(calculate_shift(self.network.max_seq))

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        output: Tensor = self.evaluate(
            hidden_states=x,
            timesteps=1000.0 * (1.0 - t),
            encoder_hidden_states_t5=condition["t5"],
            encoder_hidden_states_llama3=condition["llama"].transpose(0, 1),
            pooled_embeds=condition["pooled"],
        )
        return output
