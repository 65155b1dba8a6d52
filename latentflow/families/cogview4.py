"""CogView4 (Zheng et al. 2024, arXiv:2403.05121, in its fourth version)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift
from torch import Tensor

from .extra_channels import ControlModel
from .model import Size, Values
from .pretrained import PretrainedModel
from .training_defaults import TrainingDefaults


class CogView4Model(PretrainedModel):
    """Flow model of CogView4. Its rows have embeds, a list of B tensors (L, D).

    Its network has no mask: prompts are encoded one by one, and those of different lengths evaluated apart, so that
    none of them depends on another.
    """

    patch = 2

    @property
    def training_defaults(self) -> TrainingDefaults:
        defaults = super().training_defaults
        source = f"{defaults.source}; full: diffusers' train_control_cogview4.py"
        return replace(defaults, full_learning_rate=5e-6, source=source)

    @property
    def native_size(self) -> Size | None:
        cells = self.network.config.get("sample_size")
        return super().native_size if cells is None else (cells * self.pipeline.vae_scale_factor,) * 2

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        return {
            "embeds": [self.pipeline.encode_prompt([text], None, False, **options)[0][0] for text in prompts]
        }

    def sigmas(self, steps: int) -> list[float]:
        """Return whole timesteps from 1000 to 1, as noise levels."""
        last = self.pipeline.scheduler.config.num_train_timesteps
        levels: list[float] = (np.linspace(last, 1.0, steps).astype(np.int64) / last).tolist()
        return levels

    def mu(self, steps: int, tokens: int) -> float:
        """Return the scheduler's ``mu``, which CogView4 computes in its own way."""
        config = self.pipeline.scheduler.config
        names = {"base_image_seq_len": 256, "base_shift": 0.25, "max_shift": 0.75}
        return float(calculate_shift(tokens, *(config.get(name, usual) for name, usual in names.items())))

    def training_mu(self, tokens: int) -> float:
        return self.mu(0, tokens)

    def timestep(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the network's time (B,): 1000 times the noise level before its shift."""
        scheduler = self.pipeline.scheduler.config
        mu = self.mu(0, x.shape[2] // self.patch * (x.shape[3] // self.patch))
        shift = mu if scheduler.time_shift_type == "linear" else math.exp(mu)
        sigma = 1.0 - t
        timestep: Tensor = scheduler.num_train_timesteps * sigma / (sigma + shift * (1.0 - sigma))
        return timestep

    def size(self, x: Tensor) -> Tensor:
        """Return (height, width) in pixels, (1, 2)."""
        factor = self.pipeline.vae_scale_factor
        return torch.tensor([[x.shape[2] * factor, x.shape[3] * factor]], dtype=x.dtype, device=x.device)

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        timestep, size = self.timestep(x, t), self.size(x)
        states = self.with_extra(x, condition)

        def evaluated(rows: list[int], embeds: Tensor) -> Tensor:
            sizes = size.expand(len(rows), 2)
            output: Tensor = self.evaluate(
                hidden_states=states[rows],
                encoder_hidden_states=embeds,
                timestep=timestep[rows],
                original_size=sizes,
                target_size=sizes,
                crop_coords=torch.zeros_like(sizes),
            )
            return output

        return -self.apart(x, condition["embeds"], evaluated)


class CogView4ControlModel(ControlModel, CogView4Model):
    """Flow model of CogView4-Control, which draws under a control image.

    Its rows have embeds, a list of B tensors (L, D); they keep control (B, C, h, w).
    """
