"""Nucleus-Image, a mixture of experts (Nucleus AI 2026)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .model import Values
from .qwen_image import QwenImageModel
from .training_defaults import TrainingDefaults


class NucleusImageModel(QwenImageModel):
    """Flow model of Nucleus-Image. Its rows have embeds (B, L, D) and mask (B, L) bool.

    Guided tokens are as long as those of the prompt alone.
    """

    guidance_argument = "guidance_scale"
    sampling_options = ()
    prompt_options = ("max_sequence_length", "return_index")

    @property
    def training_defaults(self) -> TrainingDefaults:
        """Settings of a fine-tune where nobody gives any: the usual ones, not those of Qwen-Image."""
        return TrainingDefaults.usual(self)

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        longest = options.pop("max_sequence_length") or self.pipeline.default_max_sequence_length
        return super().embed(prompts, max_sequence_length=longest, **options)

    def kept_tokens(self, options: dict[str, Any]) -> dict[str, int]:
        """Return nothing: the tokenizer cuts texts off."""
        return {}

    def pack(self, x: Tensor) -> Tensor:
        packed: Tensor = self.pipeline._pack_latents(x, *x.shape, self.patch)
        return packed

    def unpack(self, tokens: Tensor, like: Tensor) -> Tensor:
        factor = self.pipeline.vae_scale_factor
        size = like.shape[2] * factor, like.shape[3] * factor
        unpacked: Tensor = self.pipeline._unpack_latents(tokens, *size, self.patch, factor)
        return unpacked.reshape(like.shape)

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        return self.output(x, t, condition, [(1, x.shape[2] // 2, x.shape[3] // 2)] * len(x))
