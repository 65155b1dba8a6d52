"""Sana (Xie et al. 2024, arXiv:2410.10629)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .added_inputs import ExtendableModel
from .consistency import ConsistencyModel
from .model import Values
from .pretrained import FixedShiftModel
from .training_defaults import documented


class SanaModel(ExtendableModel, FixedShiftModel):
    """Flow model of Sana. Its rows have embeds (B, L, D) and mask (B, L).

    An instruction stands before a prompt, but not before a negative one.
    """

    first_layer = "patch_embed.proj"
    prompt_options = ("max_sequence_length", "clean_caption", "complex_human_instruction")
    documented_training = documented("diffusers' train_dreambooth_lora_sana.py")

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, mask, _, _ = self.pipeline.encode_prompt(prompts, False, **options)
        return {"embeds": embeds, "mask": mask}

    def embed_negative(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        *_, embeds, mask = self.pipeline.encode_prompt([""] * len(prompts), True, prompts, **options)
        return {"embeds": embeds, "mask": mask}

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        output: Tensor = self.evaluate(
            self.with_extra(x, condition),
            encoder_hidden_states=condition["embeds"],
            encoder_attention_mask=condition["mask"],
            timestep=1000.0 * (1.0 - t) * self.network.config.timestep_scale,
        )
        return -output[:, : x.shape[1]]  # the rest is a learned variance


class SanaSprintModel(ConsistencyModel):
    """Flow model of Sana Sprint (Chen et al. 2025, arXiv:2503.09641), a consistency model.

    The guidance scale is an input of the network. Its rows have embeds (B, L, D) and mask (B, L).
    """

    # At an angle s of the scheduler its state is cos(s) x1 + sin(s) x0. Over cos(s) + sin(s) it lies on the straight
    # path at t = cos(s) / (cos(s) + sin(s)), and there the network predicts the average of x0 - x1.

    prompt_options = ("max_sequence_length", "clean_caption", "complex_human_instruction")
    sampling_options = ("max_timesteps", "intermediate_timesteps")

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, mask = self.pipeline.encode_prompt(prompts, **options)
        return {"embeds": embeds, "mask": mask}

    def set_timesteps(self, scheduler: Any, steps: int, height: int, width: int) -> Any:
        """Return a copy of a scheduler, whose timesteps are set as the pipeline's call sets them, with its noise levels
        on the straight path as ``sigmas``."""
        copy = type(scheduler).from_config(scheduler.config)
        between = self.option("intermediate_timesteps") if steps == 2 else None
        copy.set_timesteps(steps, max_timesteps=self.option("max_timesteps"), intermediate_timesteps=between)
        angles = copy.timesteps.double()
        copy.sigmas = (angles.sin() / (angles.cos() + angles.sin())).clamp(max=1.0)
        return copy

    def begin(self, noise: Tensor, times: Tensor) -> Tensor:
        """Return the state at the first angle: where there is data in it, noise alone takes its place."""
        return noise * torch.hypot(times[0], 1.0 - times[0]).to(noise)

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        scale = guidance_scale * self.network.config.guidance_embeds_scale
        output: Tensor = self.evaluate(
            x,
            encoder_hidden_states=condition["embeds"],
            encoder_attention_mask=condition["mask"],
            guidance=torch.full_like(t, scale, dtype=x.dtype),
            timestep=1.0 - t,
        )
        return -output
