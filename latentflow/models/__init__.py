"""Velocity networks, all called as ``model(x, t, cond)``, and the text encoders for their conditions."""

from __future__ import annotations

from .control import ControlInputs
from .dit import BLOCKS, DIT_PRESETS, DiT, dit_config
from .inputs import Condition
from .text import (
    check_vocabulary,
    encode_text,
    load_text_encoder,
    load_tokenizer,
    small_text_encoder,
    train_tokenizer,
    with_words,
)
from .token_dit import TokenDiT, settings_of
from .unet import UNet

MODELS: dict[str, type[DiT] | type[UNet]] = {"dit": DiT, "unet": UNet}

__all__ = [
    "BLOCKS",
    "DIT_PRESETS",
    "MODELS",
    "Condition",
    "ControlInputs",
    "DiT",
    "TokenDiT",
    "UNet",
    "check_vocabulary",
    "dit_config",
    "encode_text",
    "load_text_encoder",
    "load_tokenizer",
    "settings_of",
    "small_text_encoder",
    "train_tokenizer",
    "with_words",
]
