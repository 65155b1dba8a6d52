"""OmniGen (Xiao et al. 2024, arXiv:2409.11340)."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .model import Rows, Values
from .pretrained import PretrainedModel


class OmniGenModel(PretrainedModel):
    """Flow model of OmniGen, without images in its prompts. Its rows have ids, a list of B tensors (L,).

    The network itself reads the prompt, one row at a time: in a batch it gives all rows the positions of the first.
    So does the pipeline, and a negative prompt has the positions of the prompt beside it. Guidance leads away from
    the negative prompt that the pipeline's processor has.
    """

    prompt_options = ()
    patch = 2

    def _encoded(self, *args: Any) -> Rows:
        rows = super()._encoded(*args)
        return replace(rows, kept={"length": torch.tensor([len(ids) for ids in rows.values["ids"]])})

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        read = self.pipeline.multimodal_processor.process_multi_modal_prompt
        return {"ids": [torch.tensor(read(text, None)["input_ids"]) for text in prompts]}

    def null(self, n: int) -> Rows:
        """Return ``n`` rows of the negative prompt that the pipeline takes by itself."""
        processor = inspect.signature(type(self.pipeline.multimodal_processor).__call__)
        return self.encode_prompt([processor.parameters["negative_prompt"].default]).repeat(n)

    def mu(self, steps: int, tokens: int) -> None:
        """Return None: the shift is fixed."""

    def arrange(self, rows: Rows) -> dict[str, Any]:
        """Return the ids, and the lengths of the prompts whose positions they have."""
        return {**super().arrange(rows), "length": [int(length) for length in rows.kept["length"]]}

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        collator = self.pipeline.multimodal_processor.collator
        size = x.shape[2] // self.patch * 16, x.shape[3] // self.patch * 16  # the collator divides them by 16
        output = torch.empty_like(x)
        for row, (ids, length) in enumerate(zip(condition["ids"], condition["length"], strict=True)):
            texts = [{"input_ids": words, "pixel_values": None} for words in ([0] * length, ids.tolist())]
            both, places, mask, *_ = collator.process_mllm_input(texts, [size, size])
            output[row] = self.evaluate(
                hidden_states=x[row : row + 1],
                timestep=t[row : row + 1] * self.pipeline.scheduler.config.num_train_timesteps,
                input_ids=both[1:].to(x.device),
                input_img_latents=[],
                input_image_sizes={},
                attention_mask=mask[1:].to(x.device),
                position_ids=places[:1].to(x.device),
            )[0]
        return output
