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
    sampling_options: tuple[str, ...] = ("true_cfg_scale",)

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, mask = self.pipeline.encode_prompt(prompts, **options)
        if mask is None:  # no prompt is shorter than another
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return {"embeds": embeds, "mask": mask.bool()}

    def kept_tokens(self, options: dict[str, Any]) -> dict[str, int]:
        """Return the tokens of a text that are kept: those of the template's beginning, and those of a prompt."""
        before = int(self.pipeline.prompt_template_encode_start_idx)
        return {"tokenizer": before + options["max_sequence_length"]}

    def adjust_guided(self, guided: Tensor, alone: Tensor) -> Tensor:
        """Give each guided token the length that it has under the condition alone."""
        return guided * (self.token_lengths(alone) / self.token_lengths(guided))

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Evaluate the network; see `FlowModel.predict`."""
        return -self.output(x, t, condition, [[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x))

    def output(self, x: Tensor, t: Tensor, condition: dict[str, Any], shapes: list[Any]) -> Tensor:
        """Return what the network gives for x, shaped like it; ``shapes`` are its ``img_shapes``."""
        output = self.evaluate(
            hidden_states=self.pack(x),
            timestep=1.0 - t,
            encoder_hidden_states=condition["embeds"],
            encoder_hidden_states_mask=condition["mask"],
            img_shapes=shapes,
        )
        return self.unpack(output, x)


class QwenImage21Model(PretrainedModel):
    """Flow model of Qwen-Image 2.1. Its rows have embeds, a list of B tensors (L, D) of different lengths.

    Its network places the image after a prompt with its padding: prompts of different lengths are evaluated apart.
    Its autoencoder has a channel for transparency: images are opaque, and the channel is left out of them.
    """

    guidance_argument = "true_cfg_scale"
    sampling_options = ("true_cfg_scale",)
    prompt_options = ()

    @property
    def size_multiple(self) -> int:
        """Heights and widths in pixels are multiples of this: four cells make one token of a prompt's."""
        return 2 * super().size_multiple

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, mask, _ = self.pipeline.encode_prompt(prompts, **options)
        lengths = [embeds.shape[1]] * len(embeds) if mask is None else mask.sum(1).tolist()
        return {"embeds": [row[:length] for row, length in zip(embeds, lengths, strict=True)]}

    def sigmas(self, steps: int) -> list[float] | None:
        """Return the noise levels of a distilled checkpoint, or evenly spaced ones."""
        return self.pipeline.config.sample_sigmas or super().sigmas(steps)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w) float32."""
        with self.steady_vae() as vae:
            opacity = vae.config.in_channels - images.shape[1]
            return super().encode(F.pad(images, (0, 0, 0, 0, 0, opacity), value=1.0))

    def decode(self, x1: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) float32, nominally in [-1, 1]."""
        return super().decode(x1)[:, :3]

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Evaluate the network; see `FlowModel.predict`."""
        (rows, columns), count = x.shape[2:], x.shape[2] * x.shape[3]
        tokens = self.pipeline._pack_latents(x, len(x), x.shape[1], rows, columns)

        def evaluated(which: list[int], embeds: Tensor) -> Tensor:
            text = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=x.device)
            output = self.evaluate(
                hidden_states=tokens[which],
                timestep=1.0 - t[which],
                encoder_hidden_states=embeds,
                img_shapes=[[(1, rows, columns)]] * len(which),
                img_mask=F.pad(text, (0, count // 4), value=True),  # four tokens of the image make one
            )
            image: Tensor = output[:, -count:].transpose(1, 2).reshape(-1, *x.shape[1:])
            return image

        return -self.apart(x, condition["embeds"], evaluated)
