"""Bria 3.2, FIBO and FIBO 2 (Bria 2025; FIBO: Gutflaish et al., arXiv:2511.06876)."""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers.pipelines.bria.pipeline_bria import get_original_sigmas
from diffusers.pipelines.bria_fibo.pipeline_bria_fibo_edit import (
    PREFERRED_RESOLUTION,
    _vae_safe_dims,
    is_valid_edit_json,
)
from diffusers.pipelines.bria_fibo2.pipeline_bria_fibo2 import DEFAULT_NEGATIVE_PROMPT
from diffusers.utils.torch_utils import randn_tensor
from PIL.Image import Image
from torch import Tensor

from ..errors import UserError, shown
from .model import Generators, Rows, Size, Values
from .pretrained import PackedModel, PretrainedModel
from .references import ReferenceModel
from .sizes import check_size
from .training_defaults import documented


class BriaModel(PackedModel):
    """Flow model of Bria 3.2. Its rows have embeds (B, L, D), zero where there is no token.

    Guidance leads away from zeros where there is no negative prompt.
    """

    opens_whole = True
    one_by_one = True

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        return {
            "embeds": self.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, **options)[0]
        }

    def embed_negative(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        return {"embeds": self.pipeline.encode_prompt(prompts, negative_prompt=prompts, **options)[1]}

    def sigmas(self, steps: int) -> list[float]:
        """Return the ``steps`` noise levels before any shift."""
        scheduler = self.pipeline.scheduler.config
        if scheduler.use_dynamic_shifting:
            return super().sigmas(steps) or []
        levels: list[float] = get_original_sigmas(scheduler.num_train_timesteps, steps).tolist()
        return levels

    def mu(self, steps: int, tokens: int) -> float | None:
        return super().mu(steps, tokens) if self.pipeline.scheduler.config.use_dynamic_shifting else None

    def unpack(self, tokens: Tensor, like: Tensor) -> Tensor:
        factor = self.pipeline.vae_scale_factor  # which counts tokens, not cells
        size = like.shape[2] // 2 * factor, like.shape[3] // 2 * factor
        unpacked: Tensor = self.pipeline._unpack_latents(tokens, *size, factor)
        return unpacked

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        embeds = condition["embeds"]
        size = x.shape[2] // 2, x.shape[3] // 2
        output = self.evaluate(
            hidden_states=self.pack(x),
            timestep=1000.0 * (1.0 - t),
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x.device),
            img_ids=self.pipeline._prepare_latent_image_ids(1, *size, x.device, x.dtype)[0],
        )
        return -self.unpack(output, x)


class BriaFiboModel(PretrainedModel):
    """Flow model of FIBO. Its rows have embeds (B, L, D), layers (B, L, layers, D') and mask (B, L) bool."""

    opens_whole = True
    one_by_one = True

    @property
    def size_multiple(self) -> int:
        return int(self.pipeline.vae_scale_factor)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        factor = self.size_multiple
        return int(self.network.config.in_channels), height // factor, width // factor

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, _, _, mask, _, layers, _ = self.pipeline.encode_prompt(prompts, guidance_scale=1.0, **options)
        blocks = len(self.network.transformer_blocks) + len(self.network.single_transformer_blocks)
        layers = (layers + layers[-1:] * blocks)[: max(blocks, len(layers))][-blocks:]
        return {"embeds": embeds, "layers": torch.stack(layers, dim=2), "mask": mask.bool()}

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        embeds, mask, (rows, columns) = condition["embeds"], condition["mask"], x.shape[2:]
        own_places = self.pipeline._prepare_latent_image_ids(len(x), rows, columns, x.device, x.dtype)
        own = self.pipeline._pack_latents_no_patch(x, *x.shape)
        tokens = torch.cat([own, *condition.get("references", ())], dim=1)
        seen = torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1)
        output = self.evaluate(
            hidden_states=tokens,
            timestep=1000.0 * (1.0 - t),
            encoder_hidden_states=embeds,
            text_encoder_layers=[*condition["layers"].unbind(2)],
            joint_attention_kwargs={} if seen.all() else {"attention_mask": seen[:, None, None, :]},
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=torch.cat([own_places, *(of_images[0] for of_images in condition.get("places", ()))]),
        )
        factor = self.size_multiple
        unpacked: Tensor = self.pipeline._unpack_latents_no_patch(
            output[:, : own.shape[1]], rows * factor, columns * factor, factor
        )
        return -unpacked


class BriaFiboEditModel(ReferenceModel, BriaFiboModel):
    """Flow model of FIBO Edit. Its rows have embeds (B, L, D), layers (B, L, layers, D') and mask (B, L) bool.

    It edits by instruction, which is a caption in JSON with an ``edit_instruction``, and draws from several images.
    """

    sampling_options = ("_auto_resize",)
    most_images = None
    documented_training = documented("diffusers' train_dreambooth_fibo_edit.py", lora_rank=128)

    def row_of(self, prompt: str, images: list[Image], options: dict[str, Any]) -> Rows:
        """Return the row of one prompt and its images; see `ReferenceModel.row_of`.

        Raises:
            UserError: the prompt is no such caption.
        """
        if not is_valid_edit_json(prompt):
            raise UserError(
                f"the prompt is {shown(prompt)}, but FIBO Edit takes captions in JSON",
                'The least that it takes: \'{"edit_instruction": "make the apple green"}\'.',
            )
        return super().row_of(prompt, images, options)

    def read_inputs(self, inputs: dict[str, Any]) -> tuple[dict[str, Values], dict[str, Values]]:
        """Return the embeddings of the prompt, and the tokens of its images with their places."""
        embeds, tokens, places = (
            inputs["encoder_hidden_states"],
            inputs["hidden_states"][0],
            inputs["img_ids"],
        )
        layers = torch.stack(inputs["text_encoder_layers"], dim=2)
        mask = torch.ones(
            embeds.shape[:2], dtype=torch.bool, device=embeds.device
        )  # one prompt has no padding
        of_images = places[:, 0] > 0
        kept: dict[str, Values] = {"references": [tokens[of_images]], "places": [places[of_images]]}
        return {"embeds": embeds, "layers": layers, "mask": mask}, kept

    def size_for(self, image: Image) -> Size:
        """Return the size nearest in shape of those that it was trained at."""
        width, height = _vae_safe_dims(*image.size)
        if self.option("_auto_resize"):
            shape, trained = width / height, PREFERRED_RESOLUTION[1024 * 1024]
            width, height = min(trained, key=lambda size: abs(shape - size[0] / size[1]))
        return height, width


class BriaFibo2Model(PretrainedModel):
    """Flow model of FIBO 2. Its rows have embeds (B, L, bundles, D) and mask (B, L) bool.

    Prompts are sentences or captions in JSON; images of the text that a caption asks for are not drawn for it.
    """

    opens_whole = True
    prompt_options = ()
    one_by_one = True

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        captions = [self.pipeline._parse_prompt(text)[0] for text in prompts]
        texts = [
            text
            if isinstance(caption, str)
            else json.dumps(caption or {}, separators=(",", ":"), ensure_ascii=False)
            for text, caption in zip(prompts, captions, strict=True)
        ]
        return self.embed_negative(texts, **options)

    def embed_negative(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, _ = self.pipeline.encode_prompt(prompts, **options)
        embeds = embeds.transpose(1, 2)
        return {
            "embeds": embeds,
            "mask": torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device),
        }

    def null(self, n: int) -> Rows:
        """Return ``n`` rows of the negative prompt that the pipeline takes by itself, an empty caption."""
        return self.encode_negative([DEFAULT_NEGATIVE_PROMPT]).repeat(n)

    def noise(self, n: int, height: int, width: int, generator: Generators | None = None) -> Tensor:
        """Return the noise to start from, (n, C, h, w) float32, drawn before cells are joined."""
        check_size(height, width, self.size_multiple)
        factor, config = self.pipeline.vae_scale_factor, self.network.config
        shape = (n, config.in_channels, height // factor, width // factor)
        drawn: Tensor = randn_tensor(shape, generator=generator, device=self.device, dtype=torch.float32)
        return self.joined(drawn)

    def joined(self, x: Tensor) -> Tensor:
        """Join 2 x 2 cells into one: (B, C, h, w) -> (B, 4 C, h / 2, w / 2)."""
        joined: Tensor = self.pipeline._patchify_latents(x)
        return joined

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        mask = condition["mask"]
        output: Tensor = self.evaluate(
            hidden_states=self.pipeline._unpatchify_latents(x),
            timestep=1.0 - t,
            encoder_hidden_states=condition["embeds"].transpose(1, 2),
            encoder_attention_mask=None if mask.all() else mask,
        )
        return -self.joined(output)
