"""LongCat-Image (LongCat Team 2025, arXiv:2512.07584)."""

from __future__ import annotations

from typing import Any

from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids
from torch import Tensor

from .model import Values
from .pretrained import PackedModel


class LongCatImageModel(PackedModel):
    """Flow model of LongCat-Image. Its rows have embeds (B, L, D), all of one length.

    Guided tokens are no longer than those of the prompt alone, if ``enable_cfg_renorm`` is on. Prompts are taken as
    they are: ``pipeline.rewire_prompt`` has its text encoder rewrite them.
    """

    prompt_options = ()
    sampling_options = ("enable_cfg_renorm", "cfg_renorm_min")

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        return {"embeds": self.pipeline.encode_prompt(prompts, **options)[0]}

    def kept_tokens(self, options: dict[str, Any]) -> dict[str, int]:
        """Return the tokens of a prompt that are kept."""
        return {"tokenizer": self.pipeline.tokenizer_max_length}

    def adjust_guided(self, guided: Tensor, alone: Tensor) -> Tensor:
        """Give each guided token at most the length that it has under the condition alone."""
        if not self.option("enable_cfg_renorm"):
            return guided
        ratio = self.token_lengths(alone) / (self.token_lengths(guided) + 1e-8)
        return guided * ratio.clamp(self.option("cfg_renorm_min"), 1.0)

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Evaluate the network; see `FlowModel.predict`."""
        embeds, start = condition["embeds"], (self.pipeline.tokenizer_max_length,) * 2
        size = {"height": x.shape[2] // 2, "width": x.shape[3] // 2}
        output = self.evaluate(
            hidden_states=self.pack(x),
            timestep=1.0 - t,
            encoder_hidden_states=embeds,
            txt_ids=prepare_pos_ids(0, "text", num_token=embeds.shape[1]).to(x.device),
            img_ids=prepare_pos_ids(1, "image", start, **size).to(x.device),
        )
        return -self.unpack(output, x)
