"""Kandinsky 5 Image (Arkhipkin et al. 2025, arXiv:2511.14993)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .model import Values
from .pretrained import FixedShiftModel


class Kandinsky5Model(FixedShiftModel):
    """Flow model of Kandinsky 5 Image. Its rows have embeds, a list of B tensors (L, D), and pooled (B, D').

    Its network has no mask: prompts are encoded one by one, and those of different lengths evaluated apart.
    """

    noise_channels_last = True
    one_by_one = True
    patch = 2

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, pooled, _ = self.pipeline.encode_prompt(prompts, **options)
        return {"embeds": [*embeds], "pooled": pooled}

    def kept_tokens(self, options: dict[str, Any]) -> dict[str, int]:
        """Return the tokens of a text that are kept: those of the template's beginning, and those of a prompt."""
        before = int(self.pipeline.prompt_template_encode_start_idx)
        return {"tokenizer": before + options["max_sequence_length"]}

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        places = [torch.arange(size, device=x.device) for size in (1, x.shape[2] // 2, x.shape[3] // 2)]
        video = x.movedim(1, -1).unsqueeze(1)

        def evaluated(rows: list[int], embeds: Tensor) -> Tensor:
            output = self.network(
                hidden_states=video[rows],
                encoder_hidden_states=embeds,
                pooled_projections=condition["pooled"][rows],
                timestep=(1000.0 * (1.0 - t[rows])).to(x.dtype),
                visual_rope_pos=places,
                text_rope_pos=torch.arange(embeds.shape[1], device=x.device),
                scale_factor=[1.0, 1.0, 1.0],
            )
            channels_first: Tensor = output.sample.squeeze(1).movedim(-1, 1)
            return channels_first

        return -self.apart(x, condition["embeds"], evaluated)
