"""Text encoders of a stock pipeline: which it lacks, what that breaks, and the width of what the network takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import UserError

#: beginnings of the names of components that only encode prompts
TEXT_ENCODERS = ("text_encoder", "vision_language_encoder")
# Settings of networks that are the width of embeddings of prompts; the first that a network has counts.
_WIDTHS = (
    "encoder_hid_dim", "joint_attention_dim", "caption_channels", "cap_feat_dim", "text_embed_dim", "text_hidden_dim",
    "text_in_dim", "in_text_dim", "llm_features_dim", "context_in_dim", "cross_attention_dim",
)  # fmt: skip


def text_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """Return the text encoders that a pipeline has, by the names of their components."""
    parts = pipeline.components.items()
    return {
        name: part for name, part in parts if name.startswith(TEXT_ENCODERS) and isinstance(part, nn.Module)
    }


@contextmanager
def absent_encoders_named(pipeline: Any) -> Iterator[None]:
    """Name the text encoders and tokenizers that the pipeline lacks, where a call of it fails for that within.

    Raises:
        UserError: in the place of the error that Python raises where a pipeline uses what is None.
    """
    try:
        yield
    except UserError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        absent = [
            name
            for name, part in pipeline.components.items()
            if part is None and name.startswith((*TEXT_ENCODERS, "tokenizer"))
        ]
        if not absent or "None" not in str(error):
            raise
        raise UserError(
            f"prompts are to be encoded, but the pipeline has no {' and no '.join(absent)}",
            "Load what is missing. Prompts that were encoded before are passed as rows: "
            "rows = model.encode_prompt([...]), pipe(prompt_embeds=rows), likewise negative_prompt_embeds and, in an "
            "edit, source_prompt_embeds.",
        ) from error


def embeds_width(config: Mapping[str, Any]) -> int | None:
    """Return the width D of embeddings (..., D) of prompts that a network takes; None if its config does not say."""
    width = next((config[name] for name in _WIDTHS if config.get(name) is not None), None)
    return width if isinstance(width, int) else None
