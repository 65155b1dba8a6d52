"""Qwen-Image and Qwen-Image-Edit (Wu et al. 2025, arXiv:2508.02324), and Qwen-Image 2.1."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from .added_inputs import ExtendableModel
from .model import Rows, Size, Values
from .pretrained import PackedModel, PretrainedModel
from .references import ReferenceModel
from .training_defaults import TrainingDefaults, documented


class QwenImageModel(ExtendableModel, PackedModel):
    """Flow model of Qwen-Image. Its rows have embeds (B, L, D) and mask (B, L) bool.

    Guided tokens are as long as those of the prompt alone.
    """

    first_layer: str | None = "img_in"
    guidance_argument = "true_cfg_scale"
    sampling_options: tuple[str, ...] = ("true_cfg_scale",)
    documented_training = documented("diffusers' README_qwen.md", learning_rate=2e-4)

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, mask = self.pipeline.encode_prompt(prompts, **options)
        if mask is None:  # no prompt is shorter than another
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return {"embeds": embeds, "mask": mask.bool()}

    def kept_tokens(self, options: dict[str, Any]) -> dict[str, int]:
        """Return the tokens of a text that are kept: those of the template's beginning, and those of a prompt."""
        before = int(self.pipeline.prompt_template_encode_start_idx)
        return {"tokenizer": before + options["max_sequence_length"]}

    def adjust_guided(self, guided: Tensor, alone: Tensor) -> Tensor:
        """Give each guided token the length that it has under the condition alone."""
        return guided * (self.token_lengths(alone) / self.token_lengths(guided))

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        return -self.output(x, t, condition, [[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x))

    def output(self, x: Tensor, t: Tensor, condition: dict[str, Any], shapes: list[Any]) -> Tensor:
        """Return what the network gives for x, shaped like it; ``shapes`` are its ``img_shapes``."""
        tokens = self.pack(self.with_extra(x, condition))
        output = self.evaluate(
            hidden_states=torch.cat([tokens, *condition.get("references", ())], dim=1),
            timestep=1.0 - t,
            encoder_hidden_states=condition["embeds"],
            encoder_hidden_states_mask=condition["mask"],
            img_shapes=shapes,
        )
        return self.unpack(output[:, : tokens.shape[1]], x)


class QwenImageEditModel(ReferenceModel, QwenImageModel):
    """Flow model of Qwen-Image-Edit. Its rows have embeds (B, L, D) and mask (B, L) bool.

    It edits an image by instruction, and needs one: rows keep its tokens and their shapes. The text encoder sees it
    too, beside the empty prompt that guidance leads away from as well, which rows keep for that reason.
    """

    first_layer = None  # its references would need the channels as well
    needs_images = True
    text_sees_images = True

    @property
    def training_defaults(self) -> TrainingDefaults:
        usual = TrainingDefaults.usual(self)
        return usual.as_in("ai-toolkit's train_lora_qwen_image_edit_32gb.yaml", lora_rank=16)

    def kept_tokens(self, options: dict[str, Any]) -> dict[str, int]:
        """Return nothing: a prompt is read whole."""
        return {}

    def read_inputs(self, inputs: dict[str, Any]) -> tuple[dict[str, Values], dict[str, Values]]:
        """Return the embeddings of the prompt, and the tokens of its images with their shapes."""
        embeds, mask = inputs["encoder_hidden_states"], inputs["encoder_hidden_states_mask"]
        own, *shapes = inputs["img_shapes"][0]
        values = {"embeds": embeds, "mask": embeds.new_ones(embeds.shape[:2]) if mask is None else mask}
        kept: dict[str, Values] = {
            "references": [inputs["hidden_states"][0, own[0] * own[1] * own[2] :]],
            "shapes": [torch.tensor(shapes)],
        }
        return {**values, "mask": values["mask"].bool()}, kept

    def size_for(self, image: Image) -> Size:
        return self.megapixel(image)

    def arrange(self, rows: Rows) -> dict[str, Any]:
        """Return what `ReferenceModel.arrange` does, the shapes as the network takes them."""
        condition = super().arrange(rows)
        [shapes] = condition["shapes"]
        return {**condition, "shapes": [[tuple(shape) for shape in row] for row in shapes.tolist()]}

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        own = (1, x.shape[2] // 2, x.shape[3] // 2)
        return -self.output(x, t, condition, [[own, *shapes] for shapes in condition["shapes"]])


class QwenImageEditPlusModel(QwenImageEditModel):
    """Flow model of Qwen-Image-Edit Plus (2509 and later). It is Qwen-Image-Edit, and draws from several images."""

    most_images = None


class QwenImage21Model(PretrainedModel):
    """Flow model of Qwen-Image 2.1. Its rows have embeds, a list of B tensors (L, D) of different lengths.

    Its network places the image after a prompt with its padding: prompts of different lengths are evaluated apart.
    Its autoencoder has a channel for transparency: images are opaque, and the channel is left out of them.
    """

    guidance_argument = "true_cfg_scale"
    sampling_options = ("true_cfg_scale",)
    prompt_options = ()
    documented_training = documented("diffusers' train_dreambooth_lora_qwenimage21.py", lora_rank=16)

    @property
    def size_multiple(self) -> int:
        """Heights and widths in pixels are multiples of this: four cells make one token of a prompt's."""
        return 2 * super().size_multiple

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, mask, _ = self.pipeline.encode_prompt(prompts, **options)
        lengths = [embeds.shape[1]] * len(embeds) if mask is None else mask.sum(1).tolist()
        return {"embeds": [row[:length] for row, length in zip(embeds, lengths, strict=True)]}

    def sigmas(self, steps: int) -> list[float] | None:
        """Return the noise levels of a distilled checkpoint, or evenly spaced ones."""
        return self.pipeline.config.sample_sigmas or super().sigmas(steps)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return mean and standard deviation of the latents of images (B, 3, H, W) in [-1, 1]."""
        with self.steady_vae() as vae:
            opacity = vae.config.in_channels - images.shape[1]
            return super().posterior(F.pad(images, (0, 0, 0, 0, 0, opacity), value=1.0))

    def decode(self, x1: Tensor) -> Tensor:
        return super().decode(x1)[:, :3]

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        (rows, columns), count = x.shape[2:], x.shape[2] * x.shape[3]
        tokens = self.pipeline._pack_latents(x, len(x), x.shape[1], rows, columns)

        def evaluated(which: list[int], embeds: Tensor) -> Tensor:
            text = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=x.device)
            output = self.evaluate(
                hidden_states=tokens[which],
                timestep=1.0 - t[which],
                encoder_hidden_states=embeds,
                img_shapes=[[(1, rows, columns)]] * len(which),
                img_mask=F.pad(text, (0, count // 4), value=True),  # four tokens of the image make one
            )
            image: Tensor = output[:, -count:].transpose(1, 2).reshape(-1, *x.shape[1:])
            return image

        return -self.apart(x, condition["embeds"], evaluated)
