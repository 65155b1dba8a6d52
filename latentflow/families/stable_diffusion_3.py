"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .edit_defaults import EditDefaults
from .model import Values
from .pretrained import PretrainedModel


class StableDiffusion3Model(PretrainedModel):
    """Flow model of Stable Diffusion 3 and 3.5. Its rows have embeds (B, L, D) and pooled (B, D')."""

    patch = 2

    @property
    def edit_defaults(self) -> EditDefaults:
        """Settings of an edit where nobody gives any.

        FlowEdit's for SD3 (Kulikov et al. 2024, arXiv:2412.08629, appendix): 50 steps, the last 33 taken, which begin
        at t = 0.15 under SD3's shift of 3; guidance 3.5 and 13.5.
        """
        return EditDefaults(50, 0.85, 3.5, 13.5)

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, **options
        )
        return {"embeds": embeds, "pooled": pooled}

    def sigmas(self, steps: int) -> None:
        """Leave the noise levels to the scheduler."""

    def mu(self, steps: int, tokens: int) -> float | None:
        """Return the shift of a scheduler that asks for it."""
        return super().mu(steps, tokens) if self.pipeline.scheduler.config.use_dynamic_shifting else None

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Evaluate the network; see `FlowModel.predict`."""
        output: Tensor = self.evaluate(
            hidden_states=x,
            timestep=1000.0 * (1.0 - t),
            encoder_hidden_states=condition["embeds"],
            pooled_projections=condition["pooled"],
        )
        return -output
