"""Qwen-Image (Wu et al. 2025, arXiv:2508.02324) and Qwen-Image 2.1."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Values
from .pretrained import PackedModel, PretrainedModel


class QwenImageModel(PackedModel):
    """Flow model of Qwen-Image. Its rows have embeds (B, L, D) and mask (B, L) bool.

    Guided tokens are as long as those of the prompt alone.
    """

    guidance_argument = "true_cfg_scale"

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, mask = self.pipeline.encode_prompt(prompts, **options)
        if mask is None:  # no prompt is shorter than another
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return {"embeds": embeds, "mask": mask.bool()}

    def adjust_guided(self, guided: Tensor, alone: Tensor) -> Tensor:
        """Give each guided token the length that it has under the condition alone."""
        return guided * (self.token_lengths(alone) / self.token_lengths(guided))

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Evaluate the network; see `FlowModel.predict`."""
        output = self.evaluate(
            hidden_states=self.pack(x),
            timestep=1.0 - t,
            encoder_hidden_states=condition["embeds"],
            encoder_hidden_states_mask=condition["mask"],
            img_shapes=[[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x),
        )
        return -self.unpack(output, x)


class QwenImage21Model(PretrainedModel):
    """Flow model of Qwen-Image 2.1. Its rows have embeds (B, L, D) and mask (B, L) bool.

    Its autoencoder has a channel for transparency: images are opaque, and the channel is left out of them.
    """

    guidance_argument = "true_cfg_scale"
    prompt_options = ()
    patch = 2

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, mask, _ = self.pipeline.encode_prompt(prompts, **options)
        if mask is None:  # no prompt is shorter than another
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        return {"embeds": embeds, "mask": mask.bool()}

    def sigmas(self, steps: int) -> list[float]:
        """Return the noise levels of a distilled checkpoint, or evenly spaced ones."""
        return self.pipeline.config.sample_sigmas or super().sigmas(steps)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w) float32."""
        missing = self.vae.config.in_channels - images.shape[1]
        return super().encode(F.pad(images, (0, 0, 0, 0, 0, missing), value=1.0))

    def decode(self, x1: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) float32, nominally in [-1, 1]."""
        return super().decode(x1)[:, :3]

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Evaluate the network; see `FlowModel.predict`."""
        embeds, mask = condition["embeds"], condition["mask"]
        (rows, columns), tokens = x.shape[2:], x.shape[2] * x.shape[3]
        # the prompt has no images, and an image takes a quarter of its tokens among those of the prompt
        of_image = F.pad(torch.zeros_like(mask), (0, tokens // 4), value=True)
        output = self.evaluate(
            hidden_states=self.pipeline._pack_latents(x, len(x), x.shape[1], rows, columns),
            timestep=1.0 - t,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=None if mask.all() else mask,
            img_shapes=[[(1, rows, columns)]] * len(x),
            img_mask=of_image,
        )
        return -output[:, -tokens:].transpose(1, 2).reshape(x.shape)
