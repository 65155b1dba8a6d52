"""FLUX.2 dev and klein (Black Forest Labs 2025)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL.Image import Image
from torch import Tensor

from .added_inputs import ExtendableModel
from .model import Size, Values
from .references import ReferenceModel
from .training_defaults import TrainingDefaults


class Flux2Model(ReferenceModel, ExtendableModel):
    """Flow model of FLUX.2. Its rows have embeds (B, L, D).

    FLUX.2 dev takes its guidance scale as an input, klein has classifier-free guidance, and none where it is
    step-distilled. It edits by instruction, and draws from several images: rows keep their tokens and those' places.
    """

    first_layer = "x_embedder"
    prompt_options = ("max_sequence_length", "text_encoder_out_layers")
    most_images = None
    #: as in the commands of diffusers' README_flux2.md; the default of its program, 3.5, is that of drawing
    training_guidance = 1.0

    @property
    def training_defaults(self) -> TrainingDefaults:
        dev = "Klein" not in type(self.pipeline).__name__
        script = "train_dreambooth_lora_flux2.py" if dev else "train_dreambooth_lora_flux2_klein.py"
        return super().training_defaults.as_in(f"diffusers' {script}", posterior="mode")

    @property
    def embeds_guidance(self) -> bool:  # type: ignore[override]
        """True for FLUX.2 dev."""
        return bool(self.network.config.guidance_embeds)

    def guidance(self, scale: float | None) -> float:
        """Return the guidance scale; a distilled checkpoint does without."""
        return 1.0 if self.pipeline.config.get("is_distilled") else super().guidance(scale)

    def mu(self, steps: int, tokens: int) -> float | None:
        """Return the shift, which depends on the number of steps as well."""
        return float(compute_empirical_mu(tokens, steps))

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        return {"embeds": self.pipeline.encode_prompt(prompts, **options)[0]}

    def read_inputs(self, inputs: dict[str, Any]) -> tuple[dict[str, Values], dict[str, Values]]:
        """Return the embeddings of the prompt, and the tokens of its images with their places."""
        tokens, places = inputs["hidden_states"][0], inputs["img_ids"][0]
        of_images = places[:, 0] > 0  # the place in time of what is drawn is 0
        kept: dict[str, Values] = {"references": [tokens[of_images]], "places": [places[of_images]]}
        return {"embeds": inputs["encoder_hidden_states"]}, kept

    def size_for(self, image: Image) -> Size:
        """Return the size at which the network sees an image, which is its own up to a megapixel."""
        seen = Flux2ImageProcessor._resize_if_exceeds_area(image)
        return self.floored(seen.height, seen.width)

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        pipeline, embeds = self.pipeline, condition["embeds"]
        tokens = pipeline._pack_latents(self.with_extra(x, condition))
        further = tokens.shape[2] - x.shape[1]  # of known images, which references have not
        places = pipeline._prepare_latent_ids(x).to(x.device, non_blocking=True)
        output: Tensor = self.evaluate(
            hidden_states=torch.cat(
                [tokens, *(F.pad(seen, (0, further)) for seen in condition["references"])], dim=1
            ),
            timestep=1.0 - t,
            guidance=torch.full_like(t, guidance_scale) if self.embeds_guidance else None,
            encoder_hidden_states=embeds,
            txt_ids=pipeline._prepare_text_ids(embeds).to(x.device, non_blocking=True),
            img_ids=torch.cat([places, *condition["places"]], dim=1),
        )
        return -output[:, : tokens.shape[1]].transpose(1, 2).reshape(x.shape)
