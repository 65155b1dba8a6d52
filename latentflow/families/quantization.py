"""Quantised weights of pretrained models: the libraries that compute with them, and the settings they are loaded by."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import diffusers
import torch
import transformers

from ..errors import UserError
from ..utils.libraries import missing
from .index import read_index

# Value of --quantize -> the library that computes with such weights.
_LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao", "float8": "torchao"}
# Components that are quantised: networks and language models. CLIP's text encoders are small.
_LARGE = ("transformer", "unconditional_transformer", "unet", "text_encoder", "vision_language_encoder")


def check_quantization(kind: str, device: str) -> None:
    """Refuse a value of --quantize that cannot work on ``device``, torch's name of one.

    Raises:
        UserError: it needs a GPU, or a library that is missing.
    """
    if kind == "nf4" and device == "cpu":
        raise UserError("--quantize nf4 needs a GPU", "Give --quantize int8, with which a CPU computes too.")
    library = _LIBRARIES[kind]
    if importlib.util.find_spec(library) is None:
        raise missing(f"--quantize {kind} needs", library)


def quantization(kind: str, source: str) -> diffusers.PipelineQuantizationConfig:
    """Return the settings that quantise the large components of a pipeline folder or hub id.

    Args:
        kind: a value of --quantize.
        source: the folder or hub id.
    """
    index = read_index(source)

    def settings(library: Any) -> Any:
        if kind == "nf4":
            return library.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        torchao = importlib.import_module("torchao.quantization")

        names = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}
        return library.TorchAoConfig(getattr(torchao, names[kind])())

    components = {
        name: settings(transformers if entry[0] == "transformers" else diffusers)
        for name, entry in index.items()
        if name.startswith(_LARGE)
        and isinstance(entry, list)
        and entry[0]
        and not entry[1].startswith("CLIP")
    }
    return diffusers.PipelineQuantizationConfig(quant_mapping=components)
