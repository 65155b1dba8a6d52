"""Prompts of a run whose text encoders learn: the encoders stay, and encode the captions of each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from ...families import FlowModel, Rows
from ...families.pretrained import PretrainedModel
from ...families.text_encoders import text_encoders
from ..losses.pretrained import CAPTIONS, encoded_captions, encoded_null
from .encoded_prompts import EncodedPrompts


class LivePrompts:
    """Prompts that are encoded where they are needed, by the text encoders as they are then; see `EncodedPrompts`.

    Args:
        encoders: a model with the text encoders.
    """

    def __init__(self, encoders: FlowModel) -> None:
        self._encoders = text_encoders(encoders.pipeline)

    def entries(self, texts: Iterable[str]) -> Mapping[str, list[str]]:
        """Return the texts as entries of a batch, for `PretrainedLoss` to encode."""
        return {CAPTIONS: [*texts]}

    def complete(self, model: PretrainedModel) -> None:
        """Complete a model without text encoders: it is given these."""
        for name, part in self._encoders.items():
            setattr(model.pipeline, name, part)

    def rows(self, texts: Iterable[str], model: PretrainedModel) -> Rows:
        """Return a row for each text, encoded by a model that is complete."""
        return encoded_captions([*texts], model)

    def null(self, model: PretrainedModel) -> Rows:
        """Return the row that guidance leads away from."""
        return encoded_null(model)


#: where the rows of a run come from
Prompts: TypeAlias = EncodedPrompts | LivePrompts
