"""Layouts in which trainers write LoRA files: their names become peft's, and their scales part of the tensors.

In peft's layout a layer has two factors, ``PART.LAYER.lora_A.weight`` (rank, in) and ``PART.LAYER.lora_B.weight``
(out, rank). Their product times alpha / rank is added to the layer's weight. DoRA (arXiv:2402.09353) has a
``lora_magnitude_vector`` (out,) beside them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from torch import Tensor, nn

from ..errors import UserError, one_line
from ..utils.files import MEND

OWN_LAYOUT = "diffusers"
# Other layouts, by a pattern of their names.
_LAYOUTS = {
    "kohya": r"^lora_(unet|transformer|te\d?)_",
    "LyCORIS": r"^lycoris_",
    "ComfyUI": r"^(model\.)?diffusion_model\.",
    "peft": r"^base_model\.model\.",
    "old diffusers": r"\.lora\.(down|up)\.|_lora\.(down|up)\.|\.lora_linear_layer\.",
}
# Ends and beginnings of names -> peft's, after diffusers has renamed those of its own older versions.
_RENAMED = {
    r"\.(?:lora_down|lora_linear_layer\.down)\.weight$": ".lora_A.weight",
    r"\.(?:lora_up|lora_linear_layer\.up)\.weight$": ".lora_B.weight",
    r"\.lora_([AB])\.default\.(weight|bias)$": r".lora_\1.\2",
    r"\.lora_magnitude_vector(?:\.default)?\.weight$|\.dora_scale$": ".lora_magnitude_vector",
    r"^(?:base_model\.model|(?:model\.)?diffusion_model)\.": "transformer.",
}
_OF_LORA = re.compile(
    r"\.(lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector|alpha|diff)$|^added\."
)
# Beginnings of names for each part of a pipeline; after those with "_", dots are written as "_".
_BEGINNINGS = {
    "transformer": (
        "transformer.",
        "unet.",
        "",
        "lora_unet_",
        "lora_transformer_",
        "lycoris_",
        "transformer_",
    ),
    "text_encoder": ("text_encoder.", "te.", "", "transformer.", "lora_te_", "lora_te1_", "lycoris_"),
}
# What is no LoRA, by a pattern of its names.
_OTHER_KINDS = {
    r"\.lokr_": "LoKr factors (LyCORIS)",
    r"\.hada_": "LoHa factors (LyCORIS)",
    r"\.lora_mid\.": "LoCon factors with a Tucker core (LyCORIS)",
    r"\.b?oft_": "an OFT adapter",
    r"\.ia3_|\.on_input$": "an IA3 adapter",
    r"\.lora_E$|ranknum": "an AdaLoRA adapter",
    r"\.vera_": "a VeRA adapter",
    r"\.diff_b$|\.[wb]_norm$": "differences of biases or norms",
    r"absmax$|quant_map$|quant_state|\.SCB$|scaled?_(fp8|weight)$|weight_scale$": "quantised weights",
    r"^(emb_params|string_to_param|clip_[lg]|<.*>|\*)$": "a textual inversion embedding",
    r"\.(weight|bias)$": "the weights of a checkpoint",
    r"": "other weights",
}
# Models that LoRA files are often of, by a pattern of their layers, with "_" for dots.
_FAMILIES = {
    "FLUX": r"double_blocks|single_blocks|single_transformer_blocks",
    "Qwen-Image": r"transformer_blocks_\d+_(img|txt)_(mlp|mod)",
    "SD3": r"joint_blocks",
    "SD3, FLUX or another model with joint attention": r"blocks_\d+_(attn_add_|attn_to_add_|ff_context)",
    "SDXL": r"lora_te2_|text_encoder_2|input_blocks_[4-8]_1|attentions_\d_transformer_blocks_[1-9]",
    "Z-Image": r"(noise|context)_refiner|(^|_)layers_\d+_(attention|feed_forward|adaLN)",
    "Wan": r"blocks_\d+_(self_attn_[qkvo](_|$)|ffn_)",
    "Stable Diffusion": r"text_model_encoder_layers",
}
# Inputs of a U-Net's cross-attention -> the model whose text encoder has this width.
_WIDTHS_OF_TEXT = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}
_NAMED_BY = ("modelspec.architecture", "ss_base_model_version")  # metadata with the name of a file's base


def layout_of(names: Iterable[str]) -> str:
    """Return the name of the layout that a file's names have."""
    names = [*names]
    found = (layout for layout, pattern in _LAYOUTS.items() if any(re.search(pattern, n) for n in names))
    return next(found, OWN_LAYOUT)


def in_peft_names(
    state: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]], shown: str
) -> dict[str, Tensor]:
    """Return a file's tensors by peft's names, their scales multiplied into them; layers keep the file's names.

    Args:
        state: tensors of the file, by its names.
        configs: beginning of layers' names -> peft's settings that give their scales (``lora_alpha``,
            ``alpha_pattern``, ``use_rslora``), unless the file has an ``alpha`` for each layer. Without any, alpha is
            the rank.
        shown: name of the file in messages.

    Raises:
        UserError: there are tensors that belong to no LoRA, or none at all; a layer is there twice, or only its alpha.
    """
    named: dict[str, Tensor] = {}
    for key, value in convert_unet_state_dict_to_peft(state).items():
        if key.endswith(".dora_scale"):
            value = _lengths_of_rows(key, value, shown)
        for pattern, ours in _RENAMED.items():
            key = re.sub(pattern, ours, key)
        _put(named, key, value, shown)
    _refuse_other_kinds(named, shown)
    whole = {key.removesuffix(".diff"): named.pop(key) for key in [*named] if key.endswith(".diff")}
    alphas = {key.removesuffix(".alpha"): named.pop(key) for key in [*named] if key.endswith(".alpha")}
    for layer, alpha in alphas.items():
        if f"{layer}.lora_B.weight" not in named:
            raise UserError(f"{shown} lacks the factors of a layer: {layer} has an alpha alone", MEND)
        if alpha.numel() != 1 or not float(alpha) > 0:
            raise UserError(f"{shown}: {layer}.alpha is no number above 0", MEND)
    for key in [key for key in named if ".lora_B." in key]:
        layer = layer_of(key)
        up = named.get(f"{layer}.lora_B.weight")
        if up is not None and up.ndim > 1:
            config = next((own for start, own in configs.items() if layer.startswith(start)), {})
            given = {"lora_alpha": float(alphas[layer])} if layer in alphas else config
            scale = _scale(layer, up.shape[1], given)
            named[key] = named[key] if scale == 1 else named[key].float() * scale
    for layer, change in whole.items():  # one of its factors is the identity
        identity = torch.eye(change.shape[0] if change.ndim else 1, dtype=change.dtype)
        _put(named, f"{layer}.lora_A.weight", change, shown)
        _put(named, f"{layer}.lora_B.weight", identity.view(*identity.shape, *[1] * (change.ndim - 2)), shown)
    return named


def _put(tensors: dict[str, Tensor], name: str, value: Tensor, shown: str) -> None:
    if name in tensors:
        raise UserError(f"{shown} holds {name} twice, in two spellings", MEND)
    tensors[name] = value


def _lengths_of_rows(key: str, value: Tensor, shown: str) -> Tensor:
    """Return kohya's lengths (out, 1, ...) in peft's shape: (out,), for convolutions (1, out, 1, 1)."""
    if value.ndim > 1 and value.shape[0] == 1:
        raise UserError(
            f"{shown} is a DoRA of columns: {key} has a length for each input", "DoRA of rows is read."
        )
    return value.flatten() if value.ndim < 3 else value.transpose(0, 1)


def _scale(layer: str, rank: int, config: Mapping[str, Any]) -> float:
    """Return the scale that peft gives a layer's product."""
    alpha = config.get("lora_alpha", rank)
    for pattern, own in config.get("alpha_pattern", {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):  # as peft reads them
            alpha = own
            break
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else max(rank, 1))


def _refuse_other_kinds(named: Mapping[str, Tensor], shown: str) -> None:
    if not named:
        raise UserError(
            f"{shown} is no LoRA adapter: it holds no tensors", "A run's adapter is in RUN/adapter."
        )
    narrow = next((key for key, value in named.items() if value.dtype.itemsize == 1), None)
    if narrow is not None:
        kind = str(named[narrow].dtype).removeprefix("torch.")
        raise UserError(
            f"{shown} is quantised: {narrow} is {kind}", "Give a file in float32, float16 or bfloat16."
        )
    other = [key for key in named if not _OF_LORA.search(key)]
    if not other:
        return
    if len(named) <= 2 and not any("." in key or "lora" in key for key in named):
        kind, example = "a textual inversion embedding", other[0]
    else:
        kind, example = next(
            (kind, key) for pattern, kind in _OTHER_KINDS.items() for key in other if re.search(pattern, key)
        )
    beside = " beside LoRA layers" if any(".lora_" in key for key in named if key not in other) else ""
    raise UserError(
        f"{shown} is no LoRA adapter: it holds {kind}{beside}, such as {example}",
        "LoRA and DoRA are read. A run's adapter is in RUN/adapter.",
    )


def at_layers(state: Mapping[str, Tensor], parts: Mapping[str, nn.Module], shown: str) -> dict[str, Tensor]:
    """Return tensors with their layers named as in ``parts``, ``PART.LAYER``, where there is such a layer.

    Args:
        state: tensors by peft's names.
        parts: name of a part of the pipeline -> its network; one that is not loaded is left out.
        shown: name of the file in messages.

    Raises:
        UserError: a layer is there twice.
    """
    ours: dict[str, str] = {}
    for part, network in parts.items():
        names = [name for name, layer in network.named_modules() if hasattr(layer, "weight")]
        for beginning in _BEGINNINGS[part]:
            for name in names:
                for spelling in (name, name.removeprefix("unet.")):
                    flat = spelling.replace(".", "_") if beginning.endswith("_") else spelling
                    ours.setdefault(beginning + flat, f"{part}.{name}")
    if "text_encoder" not in parts:  # so that its layers can be passed over
        absent = {
            layer: re.sub(r"^(te\.|lora_te1?_)", "text_encoder.", layer) for layer in map(layer_of, state)
        }
        ours = absent | ours
    placed: dict[str, Tensor] = {}
    for key, value in state.items():
        layer = layer_of(key)
        _put(placed, ours.get(layer, layer) + key.removeprefix(layer), value, shown)
    return placed


def layer_of(key: str) -> str:
    """Return the layer of a tensor; rows of new words and classes are layers of their own."""
    return key if key.startswith("added.") else key.rpartition(".lora_")[0]


def model_of(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> str:
    """Return the name of the well-known model that a LoRA is of, or "" where neither metadata nor names tell it.

    Args:
        state: tensors by peft's names.
        metadata: of the safetensors file.
    """
    for entry in _NAMED_BY:
        if text := (metadata or {}).get(entry):
            return one_line(text.removesuffix("/lora"))[:60]
    for key, value in state.items():
        if re.match(r"transformer\.unet\.|lora_unet_unet_", key):
            return ""  # a U-Net of ours
        if key.endswith(("attn2.to_k.lora_A.weight", "attn2_to_k.lora_A.weight")) and value.ndim == 2:
            return _WIDTHS_OF_TEXT.get(value.shape[1], "")
    names = [layer_of(key).replace(".", "_") for key in state]
    found = (model for model, pattern in _FAMILIES.items() if any(re.search(pattern, name) for name in names))
    return next(found, "")
