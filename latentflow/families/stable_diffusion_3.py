"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206)."""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import Tensor

from ..errors import UserError, shown
from ..flow import LogitNormal, Velocity
from .added_inputs import ExtendableModel
from .edit_defaults import EditDefaults
from .model import Rows, Values
from .training_defaults import documented


class StableDiffusion3Model(ExtendableModel):
    """Flow model of Stable Diffusion 3 and 3.5. Its rows have embeds (B, L, D) and pooled (B, D').

    Guidance is classifier-free; the option ``skip_guidance_layers`` adds skip-layer guidance, which leads away from
    what the network predicts without these layers.
    """

    patch = 2
    first_layer = "pos_embed.proj"
    sampling_options = (
        "skip_guidance_layers",
        "skip_layer_guidance_scale",
        "skip_layer_guidance_start",
        "skip_layer_guidance_stop",
    )
    documented_training = documented("diffusers' train_dreambooth_lora_sd3.py")
    #: blocks of the network that are left out
    skipped: list[int] | None = None

    @property
    def edit_defaults(self) -> EditDefaults:
        """Settings of an edit where nobody gives any.

        FlowEdit's for SD3 (Kulikov et al. 2024, arXiv:2412.08629, appendix): 50 steps, the last 33 taken, which begin
        at t = 0.15 under SD3's shift of 3; guidance 3.5 and 13.5.
        """
        return EditDefaults(50, 0.85, 3.5, 13.5)

    def training_density(self, height: int, width: int) -> LogitNormal:
        """Return the density of the training times: logit-normal before the scheduler's shift (section 5.3.2)."""
        return LogitNormal(shift=float(self.pipeline.scheduler.config.shift))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a padded prompt that the network sees: CLIP's, then T5's."""
        return int(self.pipeline.tokenizer_max_length) + super().prompt_tokens

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, **options
        )
        return {"embeds": embeds, "pooled": pooled}

    def sigmas(self, steps: int) -> None:
        """Leave the noise levels to the scheduler."""

    def mu(self, steps: int, tokens: int) -> float | None:
        return super().mu(steps, tokens) if self.pipeline.scheduler.config.use_dynamic_shifting else None

    def velocity(
        self,
        rows: Rows,
        guidance_scale: float | None = None,
        negative: Rows | None = None,
        times: Tensor | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Velocity:
        """Return the velocity; see `FlowModel.velocity`. Skip-layer guidance takes one more evaluation."""
        layers = self.option("skip_guidance_layers")
        scale = self.guidance(guidance_scale)
        if not layers or scale == self.unguided:
            return super().velocity(rows, guidance_scale, negative, times, interval)
        blocks = len(self.network.transformer_blocks)
        if not all(isinstance(layer, int) and 0 <= layer < blocks for layer in layers):
            raise UserError(
                f"skip_guidance_layers is {shown(layers)}", f"Give numbers of blocks, 0 to {blocks - 1}."
            )
        without, keeping, kept = copy(self), copy(self), {}
        without.skipped = layers
        led_from = without._bound(rows, times, scale)

        def keep(guided: Tensor, alone: Tensor) -> Tensor:
            kept["alone"] = alone
            return guided

        keeping.adjust_guided = keep
        guided = super(StableDiffusion3Model, keeping).velocity(
            rows, guidance_scale, negative, times, interval
        )
        strength = float(self.option("skip_layer_guidance_scale"))
        start, stop = (self.option(f"skip_layer_guidance_{name}") for name in ("start", "stop"))
        side = self.native_side or 1024
        grid = (self.time_grid(None, side, side) if times is None else times).cpu()
        steps = len(grid) - 1

        def led(x: Tensor, t: Tensor) -> Tensor:
            velocity = guided(x, t)
            now = float(t.max())
            step = int((grid <= now + 1e-6).sum()) - 1
            if not (start * steps < step < stop * steps and interval[0] <= now <= interval[1]):
                return velocity
            away: Tensor = kept.pop("alone") - led_from(x, t)
            return velocity + strength * away

        return led

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        output: Tensor = self.evaluate(
            hidden_states=self.with_extra(x, condition),
            timestep=1000.0 * (1.0 - t),
            encoder_hidden_states=condition["embeds"],
            pooled_projections=condition["pooled"],
            skip_layers=self.skipped,
        )
        return -output
