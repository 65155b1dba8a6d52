"""OmniGen (Xiao et al. 2024, arXiv:2409.11340)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .model import Rows, Values
from .pretrained import PretrainedModel


class OmniGenModel(PretrainedModel):
    """Flow model of OmniGen, without images in its prompts. Its rows have ids, a list of B tensors (L,).

    The network itself reads the prompt. Guidance leads away from the negative prompt that its processor has.
    """

    prompt_options = ()
    patch = 2

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        read = self.pipeline.multimodal_processor.process_multi_modal_prompt
        return {"ids": [torch.tensor(read(text, None)["input_ids"]) for text in prompts]}

    def null(self, n: int) -> Rows:
        """Return ``n`` rows of the negative prompt that the pipeline takes by itself."""
        processor = inspect.signature(type(self.pipeline.multimodal_processor).__call__)
        return self.encode_prompt([processor.parameters["negative_prompt"].default]).repeat(n)

    def mu(self, steps: int, tokens: int) -> None:
        """Return None: the shift is fixed."""

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Evaluate the network; see `FlowModel.predict`."""
        size = x.shape[2] // self.patch * 16, x.shape[3] // self.patch * 16  # the collator divides them by 16
        texts = [{"input_ids": ids.tolist(), "pixel_values": None} for ids in condition["ids"]]
        collator = self.pipeline.multimodal_processor.collator
        ids, places, mask, *_ = collator.process_mllm_input(texts, [size] * len(x))
        output: Tensor = self.evaluate(
            hidden_states=x,
            timestep=t * self.pipeline.scheduler.config.num_train_timesteps,
            input_ids=ids.to(x.device),
            input_img_latents=[],
            input_image_sizes={},
            attention_mask=mask.to(x.device),
            position_ids=places.to(x.device),
        )
        return output
