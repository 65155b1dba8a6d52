"""HunyuanImage 2.1 (Tencent Hunyuan 2025)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.guiders.adaptive_projected_guidance_mix import MomentumBuffer
from torch import Tensor

from ..flow import Velocity
from .model import Rows, Values
from .pretrained import PretrainedModel


class GuidedSteps:
    """One of diffusers' guiders with momentum, over the steps of a grid.

    Args:
        guider: whose settings are taken; its state is left alone.
        scale: of classifier-free guidance; None: the guider's own.
        times: the grid.
    """

    def __init__(self, guider: Any, scale: float | None, times: Tensor) -> None:
        self.guider = type(guider).from_config(guider.config)
        if scale is not None:
            self.guider.guidance_scale = scale
        self.times = times.cpu()
        self.step = -1
        #: the guider's momentum before the first evaluation of the step, and after it
        self.before: Any = 0
        self.after: Any = 0

    def __call__(self, alone: Tensor, negative: Tensor, t: float) -> Tensor:
        """Return the guided velocity of those under the condition and the negative one, (B, C, h, w) at time t."""
        step = int((self.times <= t + 1e-6).sum()) - 1
        first = step != self.step
        if first:
            self.before = self.after if step > self.step >= 0 else 0  # earlier times begin another image
        momentum = self.guider.adaptive_projected_guidance_momentum
        if momentum is not None:
            self.guider.momentum_buffer = MomentumBuffer(momentum)
            self.guider.momentum_buffer.running_average = self.before
        self.guider.set_state(step, len(self.times) - 1, None)
        guided: Tensor = self.guider.forward(alone, negative).pred
        if first:
            self.step = step
            self.after = self.guider.momentum_buffer.running_average if momentum is not None else 0
        return guided


class HunyuanImageModel(PretrainedModel):
    """Flow model of HunyuanImage. Its rows have embeds (B, L, D), mask (B, L), and glyphs of quoted text with theirs.

    Guidance is that of the pipeline's guiders, of which ``ocr_guider`` is for prompts with quoted text: classifier-free
    in the first steps, then by the differences of all steps so far (adaptive projected guidance with momentum,
    arXiv:2410.02416). A solver that is given, and thus not bound to the grid, has classifier-free guidance. The
    distilled checkpoint takes its guidance scale as an input, and predicts average velocities where its config has
    ``use_meanflow``.
    """

    guidance_argument = "distilled_guidance_scale"
    prompt_options = ()
    #: no training of the distilled checkpoint is documented: 1, as for FLUX.1
    training_guidance = 1.0

    @property
    def embeds_guidance(self) -> bool:  # type: ignore[override]
        """True for the distilled checkpoint."""
        return self.network is not None and bool(self.network.config.guidance_embeds)

    @property
    def sampling_options(self) -> tuple[str, ...]:  # type: ignore[override]
        """The option of the distilled checkpoint; the scale of the other is its guider's."""
        return ("distilled_guidance_scale",) if self.embeds_guidance else ()

    @property
    def usual_guidance(self) -> float:
        """Guidance scale of the pipeline's guider; 1 without one."""
        if self.embeds_guidance:
            return float(self.option(self.guidance_argument))
        guider = self.pipeline.guider
        return float(guider.guidance_scale) if guider is not None else 1.0

    def velocity(
        self,
        rows: Rows,
        guidance_scale: float | None = None,
        negative: Rows | None = None,
        times: Tensor | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Velocity:
        """Return the velocity; see `FlowModel.velocity`.

        On a grid it remembers the steps before, of each of which the first evaluation counts; an earlier time than the
        last begins anew.
        """
        plain = super().velocity(rows, guidance_scale, negative, times, interval)
        pipeline, scale = self.pipeline, self.guidance(guidance_scale)
        if times is None or self.embeds_guidance or pipeline.guider is None or scale == self.unguided:
            return plain
        quoted = rows.values["glyph_mask"].bool().any(1)  # type: ignore[union-attr]
        of_text = pipeline.ocr_guider or pipeline.guider
        groups = [
            (GuidedSteps(guider, guidance_scale, times), which.nonzero().flatten())
            for guider, which in ((pipeline.guider, ~quoted), (of_text, quoted))
            if which.any()
        ]
        negative = self.null(1) if negative is None else negative
        negative = negative.repeat(len(rows) // len(negative))
        alone, led_from = self._bound(rows, times, scale), self._bound(negative, times, scale)

        def guided(x: Tensor, t: Tensor) -> Tensor:
            velocity = alone(x, t)
            if not interval[0] <= float(t.max()) <= interval[1]:
                return velocity
            other = led_from(x, t)
            result = torch.empty_like(velocity)
            for guider, which in groups:
                places = which.to(x.device)
                result[places] = guider(velocity[places], other[places], float(t.max()))
            return result

        return guided

    def mu(self, steps: int, tokens: int) -> None:
        """Return None: the shift is fixed."""

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        names = ("embeds", "mask", "glyphs", "glyph_mask")
        encoded = self.pipeline.encode_prompt(prompts, batch_size=len(prompts), **options)
        return dict(zip(names, encoded, strict=True))

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        averaged, guidance = self.network.config.use_meanflow, torch.full_like(t, guidance_scale)
        until = t if end is None else end
        output: Tensor = self.evaluate(
            hidden_states=x,
            timestep=(1000.0 * (1.0 - t)).to(x.dtype),
            timestep_r=(1000.0 * (1.0 - until)).to(x.dtype) if averaged else None,
            encoder_hidden_states=condition["embeds"],
            encoder_attention_mask=condition["mask"],
            encoder_hidden_states_2=condition["glyphs"],
            encoder_attention_mask_2=condition["glyph_mask"],
            guidance=(1000.0 * guidance).to(x.dtype) if self.embeds_guidance else None,
        )
        return -output
