"""FLUX.1 dev, schnell and Kontext (Black Forest Labs 2024, 2025), and Chroma, which is made of schnell."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL.Image import Image
from torch import Tensor

from .added_inputs import ExtendableModel
from .extra_channels import ControlModel, MaskedModel
from .model import Size, Values
from .pretrained import PackedModel, PretrainedModel
from .references import ReferenceModel
from .training_defaults import documented


class FluxModel(ExtendableModel, PackedModel):
    """Flow model of FLUX.1. Its rows have embeds (B, L, D) and pooled (B, D').

    FLUX.1 dev takes its guidance scale as an input; classifier-free guidance is added by the option
    ``true_cfg_scale``. FLUX.1 schnell has no guidance but that one.
    """

    first_layer: str | None = "x_embedder"
    sampling_options: tuple[str, ...] = ("true_cfg_scale",)
    #: as in every command of diffusers' README_flux.md, also for Fill; its program's default, 3.5, is that of drawing
    training_guidance = 1.0
    documented_training = documented("diffusers' train_dreambooth_lora_flux.py")

    @property
    def embeds_guidance(self) -> bool:  # type: ignore[override]
        """True for FLUX.1 dev."""
        return bool(self.network.config.guidance_embeds)

    def guidance(self, scale: float | None) -> float:
        """Return the guidance scale; without such an input the network has none."""
        return super().guidance(scale) if self.embeds_guidance else self.unguided

    def true_guidance(self, scale: float) -> float:
        return float(self.option("true_cfg_scale"))

    def describe_guidance(self) -> str:
        return "FLUX.1 leads away from it by an option of its own: true_cfg_scale above 1."

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, pooled, _ = self.pipeline.encode_prompt(prompts, None, **options)
        return {"embeds": embeds, "pooled": pooled}

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        named = {"pooled_projections": condition["pooled"]}
        if self.embeds_guidance:
            named["guidance"] = torch.full_like(t, guidance_scale)
        return self._predicted(x, t, condition, **named)

    def _predicted(self, x: Tensor, t: Tensor, condition: dict[str, Any], **named: Any) -> Tensor:
        embeds, tokens = condition["embeds"], self.pack(self.with_extra(x, condition))
        size = (x.shape[2] // 2, x.shape[3] // 2)
        own_places = self.pipeline._prepare_latent_image_ids(len(x), *size, x.device, embeds.dtype)
        places = [own_places, *(of_images[0] for of_images in condition.get("places", ()))]
        output = self.evaluate(
            hidden_states=torch.cat([tokens, *condition.get("references", ())], dim=1),
            timestep=1.0 - t,
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=torch.cat(places),
            **named,
        )
        return -self.unpack(output[:, : tokens.shape[1]], x)


class FluxKontextModel(ReferenceModel, FluxModel):
    """Flow model of FLUX.1 Kontext. Its rows have embeds (B, L, D) and pooled (B, D').

    It edits an image by instruction: rows keep its tokens and those' places. Guidance is FLUX.1 dev's.
    """

    first_layer = None  # its references would need the channels as well
    sampling_options = (*FluxModel.sampling_options, "max_area", "_auto_resize")
    documented_training = documented("diffusers' train_dreambooth_lora_flux_kontext.py", posterior="mode")

    def network_inputs(self, prompt: str, images: list[Image], options: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the network; see `ReferenceModel.network_inputs`.

        The pipeline is called for a square that it draws as it is: it reports any other size as adjusted.
        """
        side = self.floored(*[round(self.option("max_area") ** 0.5)] * 2)[0]
        square = {"height": side, "width": side, "max_area": side * side}
        return super().network_inputs(prompt, images, {**options, **square})

    def read_inputs(self, inputs: dict[str, Any]) -> tuple[dict[str, Values], dict[str, Values]]:
        """Return the embeddings of the prompt, and the tokens of its image with their places."""
        tokens, places = inputs["hidden_states"][0], inputs["img_ids"]
        of_image = places[:, 0] == 1  # it is 0 in what is drawn
        kept: dict[str, Values] = {"references": [tokens[of_image]], "places": [places[of_image]]}
        return {"embeds": inputs["encoder_hidden_states"], "pooled": inputs["pooled_projections"]}, kept

    def size_for(self, image: Image) -> Size:
        """Return the size at which the network sees an image, one of those that it was trained at; smaller where the
        option ``max_area`` is."""
        shape, (width, height) = image.width / image.height, image.size
        if self.option("_auto_resize"):
            width, height = min(
                PREFERRED_KONTEXT_RESOLUTIONS, key=lambda size: abs(shape - size[0] / size[1])
            )
        area = self.options.get("max_area", width * height)
        scale = min(1.0, (area / (width * height)) ** 0.5)
        return self.floored(int(height * scale), int(width * scale))


class FluxExtraModel(FluxModel):
    """Flow model of FLUX.1 whose network takes an image: its guidance is the network's input alone."""

    first_layer = None
    sampling_options = ()

    def true_guidance(self, scale: float) -> float:
        return 1.0

    def describe_guidance(self) -> str:
        return super(FluxModel, self).describe_guidance()


class FluxFillModel(MaskedModel, FluxExtraModel):
    """Flow model of FLUX.1 Fill, which fills the hole of an image. Its guidance scale is an input.

    Its rows have embeds (B, L, D) and pooled (B, D'); they keep known (B, C, h, w) and mask (B, f^2, h, w), where the
    autoencoder's factor is f.
    """

    extra = ("known", "mask")

    def mask_channels(self, masks: Tensor, known: Tensor) -> Tensor:
        """Return the pixels of each cell of the latent as channels."""
        count, channels, rows, columns = known.shape
        packed, _ = self.pipeline.prepare_mask_latents(
            masks, known, count, channels, 1, *masks.shape[2:], masks.dtype, masks.device, None
        )
        return self.unpack(packed, masks.new_empty(count, self.pipeline.vae_scale_factor**2, rows, columns))


class FluxControlModel(ControlModel, FluxExtraModel):
    """Flow model of FLUX.1 Canny and Depth, which draw under a control image. Their guidance scale is an input.

    Its rows have embeds (B, L, D) and pooled (B, D'); they keep control (B, C, h, w).
    """

    learns_with_images = True
    #: as in diffusers' train_control_lora_flux.py: these networks were made for scales of 10 to 30
    training_guidance = 30.0
    documented_training = documented("diffusers' train_control_lora_flux.py")


class ChromaModel(FluxModel):
    """Flow model of Chroma: FLUX.1's layout, classifier-free guidance. Its rows have embeds (B, L, D), mask (B, L)."""

    embeds_guidance = False
    sampling_options = ()
    documented_training = documented("ai-toolkit's train_lora_chroma_24gb.yaml", lora_rank=16)

    def guidance(self, scale: float | None) -> float:
        return PretrainedModel.guidance(self, scale)

    def true_guidance(self, scale: float) -> float:
        return scale

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, _, mask, *_ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, **options
        )
        return {"embeds": embeds, "mask": mask}

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        tokens = x.shape[2] // 2 * (x.shape[3] // 2)
        mask = self.pipeline._prepare_attention_mask(len(x), tokens, x.dtype, condition["mask"])
        return self._predicted(x, t, condition, attention_mask=mask)
