"""InstructPix2Pix (Brooks et al. 2022, arXiv:2211.09800): Stable Diffusion that edits an image as a prompt says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import finite
from ..flow import Velocity, guide_batched
from .diffusion import DiffusionModel, StableDiffusionModel, StableDiffusionXLModel
from .extra_channels import ControlModel
from .model import Rows, Values, negative_of


class TwoScalesModel(ControlModel, DiffusionModel):
    """Family that is guided by the prompt and by the image. Its rows also keep control (B, C, h, w).

    The option ``image_guidance_scale`` is the scale of the image, at which 1 adds nothing, and below which the stock
    pipeline draws without any guidance.
    """

    prompt_options: tuple[str, ...] = ()
    sampling_options = ("image_guidance_scale",)

    def __init__(self, pipeline: Any, **options: Any) -> None:
        super().__init__(pipeline, **options)
        fix = "Give at least 1: below, the stock pipeline draws without any guidance, as at guidance scale 1."
        finite("image_guidance_scale", self.option("image_guidance_scale"), 1.0, fix=fix)

    def control_latents(self, images: Tensor) -> Tensor:
        """Images (P, 3, H, W) in [-1, 1] -> their latents as the autoencoder makes them (P, C, h, w)."""
        with self.steady_vae() as vae:
            latents: Tensor = self.pipeline.prepare_image_latents(
                images, len(images), 1, vae.dtype, self.device, False
            )
        return latents

    def velocity(
        self,
        rows: Rows,
        guidance_scale: float | None = None,
        negative: Rows | None = None,
        times: Tensor | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Velocity:
        """See `FlowModel.velocity`; each guided call is one evaluation of 3B rows (the paper's equation 3)."""
        scale, further = self.guidance(guidance_scale), float(self.option("image_guidance_scale")) - 1.0
        if scale == 1.0 or further == 0.0:
            return super().velocity(rows, scale, negative, times, interval)
        alone = self._bound(rows, times, scale)
        seen = negative_of(rows, self.null(1) if negative is None else negative)
        control = rows.kept["control"]
        assert isinstance(control, Tensor)
        blind = replace(seen, kept={"control": torch.zeros_like(control)})
        of_three = self._bound(Rows.cat([rows, seen, blind]), times, scale)

        def pair(x: Tensor, t: Tensor) -> Tensor:
            """Return the velocities under the prompt and without it, both led away from that without the image."""
            half = len(rows)
            each = torch.cat([t, t[:half]]) if t.ndim else t
            prompted, image, none = of_three(torch.cat([x, x[:half]]), each).chunk(3)
            lead = further * (image - none)
            return torch.cat([prompted + lead, image + lead])

        return guide_batched(pair, alone, scale, interval)


class InstructPix2PixModel(TwoScalesModel, StableDiffusionModel):
    """Flow model of InstructPix2Pix, whose control image is the one to edit, and whose prompt says how.

    Its rows have embeds (B, L, D); they keep control (B, C, h, w). The option ``image_guidance_scale`` is a second
    guidance scale, towards the image.
    """

    sized_by_control = True

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        return {"embeds": self.pipeline._encode_prompt(prompts, self.device, 1, False)}


class InstructPix2PixXLModel(TwoScalesModel, StableDiffusionXLModel):
    """Flow model of InstructPix2Pix of SDXL, which is used like the other.

    Its rows have embeds (B, L, D) and pooled (B, D'); they keep control (B, C, h, w).
    """
