"""What goes with each sample as its condition, prepared once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data import Source, cached_text
from .start import Networks


def condition_rows(source: Source, networks: Networks) -> dict[str, Tensor]:
    """The tensors that `FlowStage` makes its condition of, one row per picture of ``source``.

    Classes become ids, captions token ids (for an encoder that is trained along) or cached embeddings (frozen).
    """
    if source.kind == "class":
        return {"class_labels": torch.tensor(source.class_ids())}
    if source.kind == "text" and networks.trained_text:
        limit = networks.tokenizer.model_max_length
        tokens = networks.tokenizer(
            source.captions(), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    if source.kind == "text":
        table = cached_text(source.captions(), networks.tokenizer, networks.text_encoder)
        return {"text": table.embeds[table.rows], "text_mask": table.mask[table.rows]}
    return {}
