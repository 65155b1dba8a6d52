"""LongCat-Image (LongCat Team 2025, arXiv:2512.07584)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids, split_quotation
from PIL.Image import Image
from torch import Tensor

from ..errors import UserError
from .model import Rows, Size, Values
from .pretrained import PackedModel
from .references import ReferenceModel


class LongCatImageModel(PackedModel):
    """Flow model of LongCat-Image. Its rows have embeds (B, L, D), all of one length.

    Guided tokens are no longer than those of the prompt alone, if ``enable_cfg_renorm`` is on. Prompts are taken as
    they are: ``pipeline.rewire_prompt`` has its text encoder rewrite them.
    """

    prompt_options = ()
    sampling_options: tuple[str, ...] = ("enable_cfg_renorm", "cfg_renorm_min")

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        return {"embeds": self.pipeline.encode_prompt(prompts, **options)[0]}

    def kept_tokens(self, options: dict[str, Any]) -> dict[str, int]:
        return {"tokenizer": self.pipeline.tokenizer_max_length}

    def adjust_guided(self, guided: Tensor, alone: Tensor) -> Tensor:
        """Give each guided token at most the length that it has under the condition alone."""
        if not self.option("enable_cfg_renorm"):
            return guided
        ratio = self.token_lengths(alone) / (self.token_lengths(guided) + 1e-8)
        return guided * ratio.clamp(self.option("cfg_renorm_min"), 1.0)

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        return self._predicted(x, t, condition["embeds"], self.pipeline.tokenizer_max_length)

    def _predicted(
        self,
        x: Tensor,
        t: Tensor,
        embeds: Tensor,
        first_place: int,
        references: Sequence[Tensor] = (),
        places: Sequence[Tensor] = (),
    ) -> Tensor:
        tokens, size = self.pack(x), {"height": x.shape[2] // 2, "width": x.shape[3] // 2}
        own_places = prepare_pos_ids(1, "image", (first_place, first_place), **size).to(x.device)
        output = self.evaluate(
            hidden_states=torch.cat([tokens, *references], dim=1),
            timestep=1.0 - t,
            encoder_hidden_states=embeds,
            txt_ids=prepare_pos_ids(0, "text", num_token=embeds.shape[1]).to(x.device),
            img_ids=torch.cat([own_places, *(of_images[0] for of_images in places)]),
        )
        return -self.unpack(output[:, : tokens.shape[1]], x)


class LongCatImageEditModel(ReferenceModel, LongCatImageModel):
    """Flow model of LongCat-Image-Edit. Its rows have embeds (B, L, D).

    It edits an image by instruction, and needs one. Guidance leads away from the empty prompt beside the same image.
    """

    needs_images = True
    text_sees_images = True
    sampling_options = ()

    def adjust_guided(self, guided: Tensor, alone: Tensor) -> Tensor:
        return guided

    def kept_tokens(self, options: dict[str, Any]) -> dict[str, int]:
        """Return nothing: a prompt is read whole, or refused."""
        return {}

    def row_of(self, prompt: str, images: list[Image], options: dict[str, Any]) -> Rows:
        """Return the row of one prompt and its images; see `ReferenceModel.row_of`.

        Raises:
            UserError: the prompt is longer than the text encoder reads.
        """
        # quoted text is read by its characters
        parts = [part for text, quoted in split_quotation(prompt) for part in (text if quoted else [text])]
        tokens = sum(
            len(self.pipeline.tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts
        )
        limit = self.pipeline.tokenizer_max_length
        if tokens > limit:  # the stock pipeline fails in the warning that it logs
            raise UserError(
                f"the prompt has {tokens} tokens, more than the {limit} that LongCat-Image-Edit reads",
                "Shorten it; a letter in quotes is a token of its own.",
            )
        return super().row_of(prompt, images, options)

    def read_inputs(self, inputs: dict[str, Any]) -> tuple[dict[str, Values], dict[str, Values]]:
        """Return the embeddings of the prompt, and the tokens of its image with their places."""
        tokens, places = inputs["hidden_states"][0], inputs["img_ids"].long()
        of_image = places[:, 0] == 2  # it is 1 in what is drawn
        kept: dict[str, Values] = {"references": [tokens[of_image]], "places": [places[of_image]]}
        return {"embeds": inputs["encoder_hidden_states"]}, kept

    def size_for(self, image: Image) -> Size:
        return self.megapixel(image)

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        embeds = condition["embeds"]
        return self._predicted(x, t, embeds, embeds.shape[1], condition["references"], condition["places"])
