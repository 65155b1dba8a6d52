"""Kolors (Kolors Team 2024, https://github.com/Kwai-Kolors/Kolors)."""

from __future__ import annotations

import os
from typing import Any

from ..utils.libraries import missing
from .diffusion import StableDiffusionXLModel
from .training_defaults import documented


class KolorsModel(StableDiffusionXLModel):
    """Flow model of Kolors; it needs `pip install sentencepiece`. Its rows have embeds (B, L, D) and pooled (B, D')."""

    prompt_options = ()  # the stock call takes max_sequence_length, and encodes 256 tokens all the same
    documented_training = documented("Kolors' dreambooth/train.sh", learning_rate=2e-5)

    @staticmethod
    def open_pipeline(name_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """Open the diffusers pipeline of a folder or hub id; see `FlowModel.open_pipeline`.

        Raises:
            UserError: also where the package that reads its tokenizer is not installed.
        """
        try:
            import sentencepiece  # noqa: F401 - diffusers has the pipeline only beside it
        except ImportError as error:
            raise missing("the tokenizer of Kolors needs", "sentencepiece") from error
        return StableDiffusionXLModel.open_pipeline(name_or_path, **options)
