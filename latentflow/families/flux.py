"""FLUX.1 dev, schnell and Kontext (Black Forest Labs 2024, 2025), and Chroma, which is made of schnell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL.Image import Image
from torch import Tensor

from .model import Size, Values
from .pretrained import PackedModel
from .references import ReferenceModel


class FluxModel(PackedModel):
    """Flow model of FLUX.1. Its rows have embeds (B, L, D) and pooled (B, D').

    FLUX.1 dev takes its guidance scale as an input; classifier-free guidance is added by the option
    ``true_cfg_scale``. FLUX.1 schnell has no guidance but that one.
    """

    @property
    def embeds_guidance(self) -> bool:  # type: ignore[override]
        """True for FLUX.1 dev."""
        return bool(self.network.config.guidance_embeds)

    def true_guidance(self, scale: float) -> float:
        """Return the option ``true_cfg_scale``."""
        return float(self.option("true_cfg_scale"))

    def describe_guidance(self) -> str:
        """Return how a negative prompt takes effect, as the second half of an error."""
        return "FLUX.1 leads away from it by an option of its own: true_cfg_scale above 1."

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, pooled, _ = self.pipeline.encode_prompt(prompts, None, **options)
        return {"embeds": embeds, "pooled": pooled}

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Evaluate the network; see `FlowModel.predict`."""
        embeds = condition["embeds"]
        named = {"pooled_projections": condition["pooled"]}
        if self.embeds_guidance:
            named["guidance"] = torch.full_like(t, guidance_scale)
        kept = {name: condition.get(name, ()) for name in ("references", "places")}
        return self._predicted(x, t, embeds, **kept, **named)

    def _predicted(
        self,
        x: Tensor,
        t: Tensor,
        embeds: Tensor,
        references: Sequence[Tensor] = (),
        places: Sequence[Tensor] = (),
        **named: Any,
    ) -> Tensor:
        tokens, size = self.pack(x), (x.shape[2] // 2, x.shape[3] // 2)
        own_places = self.pipeline._prepare_latent_image_ids(len(x), *size, x.device, embeds.dtype)
        output = self.evaluate(
            hidden_states=torch.cat([tokens, *references], dim=1),
            timestep=1.0 - t,
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=torch.cat([own_places, *(of_images[0] for of_images in places)]),
            **named,
        )
        return -self.unpack(output[:, : tokens.shape[1]], x)


class FluxKontextModel(ReferenceModel, FluxModel):
    """Flow model of FLUX.1 Kontext. Its rows have embeds (B, L, D) and pooled (B, D').

    It edits an image by instruction: rows keep its tokens and those' places. Guidance is FLUX.1 dev's.
    """

    def read_inputs(self, inputs: dict[str, Any]) -> tuple[dict[str, Values], dict[str, Values]]:
        """Return the embeddings of the prompt, and the tokens of its image with their places."""
        tokens, places = inputs["hidden_states"][0], inputs["img_ids"]
        of_image = places[:, 0] == 1  # it is 0 in what is drawn
        kept: dict[str, Values] = {"references": [tokens[of_image]], "places": [places[of_image]]}
        return {"embeds": inputs["encoder_hidden_states"], "pooled": inputs["pooled_projections"]}, kept

    def size_for(self, image: Image) -> Size:
        """Return the size at which the network sees an image, one of those that it was trained at."""
        if not self.option("_auto_resize"):
            return self.floored(image.height, image.width)
        shape = image.width / image.height
        width, height = min(PREFERRED_KONTEXT_RESOLUTIONS, key=lambda size: abs(shape - size[0] / size[1]))
        return self.floored(height, width)


class ChromaModel(FluxModel):
    """Flow model of Chroma: FLUX.1's layout, classifier-free guidance. Its rows have embeds (B, L, D), mask (B, L)."""

    embeds_guidance = False

    def true_guidance(self, scale: float) -> float:
        """Return the scale."""
        return scale

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, _, mask, *_ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, **options
        )
        return {"embeds": embeds, "mask": mask}

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Evaluate the network; see `FlowModel.predict`."""
        tokens = x.shape[2] // 2 * (x.shape[3] // 2)
        mask = self.pipeline._prepare_attention_mask(len(x), tokens, x.dtype, condition["mask"])
        return self._predicted(x, t, condition["embeds"], attention_mask=mask)
