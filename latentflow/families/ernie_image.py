"""ERNIE-Image (Baidu 2026)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .model import Values
from .pretrained import PretrainedModel


class ErnieImageModel(PretrainedModel):
    """Flow model of ERNIE-Image. Its rows have embeds, a list of B tensors (L, D) of different lengths.

    Prompts are taken as they are: the pipeline's own call has its ``pe`` rewrite them, if it has one.
    """

    prompt_options = ()

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        return {"embeds": self.pipeline.encode_prompt(prompts, self.device, **options)}

    def mu(self, steps: int, tokens: int) -> None:
        """Return None: the shift is fixed."""

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        texts, lengths = self.pipeline._pad_text(
            condition["embeds"], x.device, x.dtype, self.network.config.text_in_dim
        )
        output: Tensor = self.evaluate(
            hidden_states=x, timestep=1000.0 * (1.0 - t), text_bth=texts, text_lens=lengths
        )
        return -output
