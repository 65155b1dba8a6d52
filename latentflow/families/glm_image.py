"""GLM-Image (Z.ai 2026): a language model draws a plan of the image in tokens, a flow model the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .cogview4 import CogView4Model
from .model import Rows, Values
from .training_defaults import TrainingDefaults


class GlmImageModel(CogView4Model):
    """Flow model of GLM-Image. Its rows have embeds, a list of B tensors (L, D) of quoted text, and a plan (B, N).

    A plan is of one size: `encode_prompt` is given the size of the image. Guidance leaves the plan out.
    """

    opens_whole = True
    follows_plan = True
    one_by_one = True

    @property
    def training_defaults(self) -> TrainingDefaults:
        """Settings of a fine-tune where nobody gives any: the usual ones, not those of CogView4."""
        return TrainingDefaults.usual(self)

    def encode_prompt(
        self,
        prompts: Sequence[str],
        images: Sequence[Any] = (),
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Rows:
        """Return one row for each prompt.

        Args:
            height, width: of what is drawn, in pixels; None is `native_size`.
            generator: its seed is the plan's.
            images, options: see `PretrainedModel.encode_prompt`.
        """
        texts = [prompts] if isinstance(prompts, str) else [*prompts]
        native = self.native_size or (1024, 1024)
        size = {"height": height or native[0], "width": width or native[1], "generator": generator}
        plans = [self.pipeline.generate_prior_tokens(text, **size)[0] for text in texts]
        return replace(super().encode_prompt(texts, images, **options), kept={"plan": torch.cat(plans)})

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, _ = self.pipeline.encode_prompt(prompts, False, **options)
        return {"embeds": [*embeds], "planned": torch.ones(len(embeds), dtype=torch.bool)}

    def embed_negative(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        return {**self.embed(prompts, **options), "planned": torch.zeros(len(prompts), dtype=torch.bool)}

    @property
    def size_multiple(self) -> int:
        """Heights and widths in pixels are multiples of this: a token of the plan is two of the network's."""
        return 2 * super().size_multiple

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return mean and standard deviation of latents without the autoencoder's factor; see `FlowModel.encode`."""
        with self.steady_vae() as vae:
            mean, std = super().posterior(images)
            factor = float(vae.config.scaling_factor)
            return mean / factor, None if std is None else std / factor

    def decode(self, x1: Tensor) -> Tensor:
        with self.steady_vae() as vae:
            return super().decode(x1 * vae.config.scaling_factor)

    def sigmas(self, steps: int) -> list[float]:
        """Return whole timesteps from 1000 towards 1, as noise levels."""
        last = self.pipeline.scheduler.config.num_train_timesteps
        levels: list[float] = (np.linspace(last, 1.0, steps + 1)[:-1].astype(np.int64) / last).tolist()
        return levels

    def arrange(self, rows: Rows) -> dict[str, Any]:
        """Return the values by their names, and the plans, which rows that leave them out may lack."""
        return {**super().arrange(rows), "plan": rows.kept.get("plan")}

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Evaluate the network; see `FlowModel.predict`.

        Raises:
            UserError: the plan is of another size.
        """
        plan, timestep, size = condition["plan"], self.timestep(x, t) - 1.0, self.size(x)
        tokens = x.shape[2] // self.patch * (x.shape[3] // self.patch)
        if plan is None:
            plan = torch.zeros(len(x), tokens, dtype=torch.long, device=x.device)
        if plan.shape[1] != tokens:
            raise UserError(
                "the plan that the language model drew is of another size than the image",
                "Encode prompts for the size: model.encode_prompt([...], height=..., width=...).",
            )
        left_out = ~condition["planned"][:, None].expand_as(plan)

        def evaluated(rows: list[int], embeds: Tensor) -> Tensor:
            sizes = size.expand(len(rows), 2)
            output: Tensor = self.evaluate(
                hidden_states=x[rows],
                encoder_hidden_states=embeds,
                prior_token_id=plan[rows],
                prior_token_drop=left_out[rows],
                timestep=timestep[rows],
                target_size=sizes,
                crop_coords=torch.zeros_like(sizes),
            )
            return output

        return -self.apart(x, condition["embeds"], evaluated)
