"""Adapters (LoRA) written in the layouts of other programs, which diffusers' loaders read back.

Every layout has alpha / rank multiplied into its tensors, so that no reader can take another strength. For our own
networks `adapter_layouts` reads such files; those of pretrained models are read by their pipelines' own loaders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import safe_open
from torch import Tensor

from ..errors import UserError, few, unknown
from ..utils.components import library_reads, without_reports
from ..utils.files import MEND, parse_json, save_tensors
from .adapter_files import CLASSES, CONTROL, INPUTS, INTERVALS, WORDS, settings_of
from .adapter_layouts import OWN_LAYOUT, in_peft_names, layer_of, layout_of

Layout = Literal["diffusers", "comfyui", "kohya"]
LAYOUTS: tuple[str, ...] = get_args(Layout)
_SHOWN = {"comfyui": "ComfyUI's layout", "kohya": "kohya's layout"}
_KEEP = "Leave it in diffusers' layout."
Tensors: TypeAlias = dict[str, Tensor]
Factors: TypeAlias = tuple[Tensor, Tensor]  # lora_A (rank, in) and lora_B (out, rank)
# Layer of a model's original network -> that of diffusers, or its parts in order with their shares of the outputs.
# N is the number of a block.
Names: TypeAlias = Mapping[str, str | Mapping[str, int]]

_A, _B, _DORA, _LENGTHS = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".dora_scale"
_ADDED = {
    WORDS: "new words",
    CLASSES: "new classes",
    INTERVALS: "the lengths of a few-step network's steps",
    CONTROL: "inputs for control images",
    INPUTS["masks", "independent"]: "input channels for masks",
}


def _attention(block: str, *layers: str, shares: Iterable[int] = (1, 1, 1)) -> Mapping[str, int]:
    """Return the layers of a block that are one in the original network, with their shares of its outputs."""
    return {f"{block}.N.{layer}": share for layer, share in zip(layers, shares, strict=True)}


_BLOCKS: Names = {
    "double_blocks.N.img_attn.qkv": _attention("transformer_blocks", "attn.to_q", "attn.to_k", "attn.to_v"),
    "double_blocks.N.img_attn.proj": "transformer_blocks.N.attn.to_out.0",
    "double_blocks.N.txt_attn.qkv": _attention(
        "transformer_blocks", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"
    ),
    "double_blocks.N.txt_attn.proj": "transformer_blocks.N.attn.to_add_out",
}
_FLUX: Names = {
    **_BLOCKS,
    "double_blocks.N.img_mod.lin": "transformer_blocks.N.norm1.linear",
    "double_blocks.N.txt_mod.lin": "transformer_blocks.N.norm1_context.linear",
    "double_blocks.N.img_mlp.0": "transformer_blocks.N.ff.net.0.proj",
    "double_blocks.N.img_mlp.2": "transformer_blocks.N.ff.net.2",
    "double_blocks.N.txt_mlp.0": "transformer_blocks.N.ff_context.net.0.proj",
    "double_blocks.N.txt_mlp.2": "transformer_blocks.N.ff_context.net.2",
    "single_blocks.N.linear1": _attention(
        "single_transformer_blocks", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", shares=(1, 1, 1, 4)
    ),
    "single_blocks.N.linear2": "single_transformer_blocks.N.proj_out",
    "single_blocks.N.modulation.lin": "single_transformer_blocks.N.norm.linear",
}
_FLUX2: Names = {
    **_BLOCKS,
    "double_blocks.N.img_mlp.0": "transformer_blocks.N.ff.linear_in",
    "double_blocks.N.img_mlp.2": "transformer_blocks.N.ff.linear_out",
    "double_blocks.N.txt_mlp.0": "transformer_blocks.N.ff_context.linear_in",
    "double_blocks.N.txt_mlp.2": "transformer_blocks.N.ff_context.linear_out",
    "single_blocks.N.linear1": "single_transformer_blocks.N.attn.to_qkv_mlp_proj",
    "single_blocks.N.linear2": "single_transformer_blocks.N.attn.to_out",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_LUMINA2: Names = {
    f"{block}.N.{original}": layers
    for block in ("layers", "noise_refiner", "context_refiner")
    for original, layers in (
        ("attention.qkv", _attention(block, "attn.to_q", "attn.to_k", "attn.to_v", shares=(3, 1, 1))),
        ("attention.out", f"{block}.N.attn.to_out.0"),
        ("feed_forward.w1", f"{block}.N.feed_forward.linear_1"),
        ("feed_forward.w2", f"{block}.N.feed_forward.linear_2"),
        ("feed_forward.w3", f"{block}.N.feed_forward.linear_3"),
        ("adaLN_modulation.1", f"{block}.N.norm1.linear"),
    )
}
_IDEOGRAM4: Names = {
    "layers.N.attention.qkv": _attention("layers", "attention.to_q", "attention.to_k", "attention.to_v"),
    "layers.N.attention.o": "layers.N.attention.to_out.0",
    **{
        f"layers.N.{layer}": f"layers.N.{layer}"
        for layer in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaln_modulation")
    },
}

# Class of a network -> its layers in kohya's files (sd-scripts, musubi-tuner); None: they are diffusers' own.
_KOHYA: dict[str, Names | None] = {
    "UNet2DConditionModel": None,
    "FluxTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": _FLUX,
    "Flux2Transformer2DModel": _FLUX2,
    "QwenImageTransformer2DModel": None,
    "ZImageTransformer2DModel": None,
}
# Class of a network -> its layers in ComfyUI, where ComfyUI does not read diffusers' names.
_COMFYUI: dict[str, Names] = {
    "Lumina2Transformer2DModel": _LUMINA2,
    "Ideogram4Transformer2DModel": _IDEOGRAM4,
}
# Class of a network whose layers ComfyUI knows by diffusers' names (see model_lora_keys_unet in its comfy/lora.py) ->
# pattern of those that it does not know.
_READ_BY_COMFYUI = {
    "SD3Transformer2DModel": "",
    "FluxTransformer2DModel": "",
    "ChromaTransformer2DModel": r"^distilled_guidance_layer\.",
    "Flux2Transformer2DModel": r"^time_guidance_embed\.|_stream_modulation|^norm_out\.",
    "QwenImageTransformer2DModel": "",
    "QwenImage21Transformer2DModel": "",
    "ZImageTransformer2DModel": r"siglip",
    "HiDreamImageTransformer2DModel": "",
    "AuraFlowTransformer2DModel": "",
    "Krea2Transformer2DModel": "",
    "ErnieImageTransformer2DModel": "",
    "Kandinsky5Transformer3DModel": "",
}


def layouts_of(kind: Any = None) -> list[str]:
    """Return the layouts in which adapters of a pipeline class are written: those that its loader reads back.

    Args:
        kind: stock pipeline class; None: one of ours.
    """
    if kind is None:
        return [*LAYOUTS]
    if not hasattr(kind, "lora_state_dict"):
        return [OWN_LAYOUT]
    network = _network_class(kind)
    known = {
        OWN_LAYOUT: True,
        "comfyui": network in {*_COMFYUI, *_READ_BY_COMFYUI, "UNet2DConditionModel"},
        "kohya": network in _KOHYA,
    }
    return [layout for layout, there in known.items() if there]


def in_layout(
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any] | None,
    layout: str,
    kind: Any = None,
    shown: str = "the adapter",
) -> Tensors:
    """Return an adapter's tensors by the names of a layout, alpha / rank multiplied into them.

    Layers that are one in the original network (q, k and v) are stacked: their ranks add up, and zeros fill the rest.
    What is written for a pretrained model is read back by the pipeline's own loader, and compared.

    Args:
        state: tensors by diffusers' names, ``PART.LAYER.lora_A.weight``.
        settings: those of peft for each part (``transformer.r``, ``transformer.lora_alpha``, ...), as diffusers keeps
            them in a file; None: alpha is the rank.
        layout: one of `LAYOUTS`; tensors in diffusers' are returned as they are.
        kind: stock pipeline class that the adapter is for; None: one of ours.
        shown: name of the adapter in messages.

    Raises:
        UserError: the layout is unknown, or none of this model's; it cannot hold what the adapter brings; the adapter
            is in another layout than diffusers', or its settings lack alpha; a layer is not read back as it is.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    if layout == OWN_LAYOUT:
        return {**state}
    if layout not in (there := layouts_of(kind)):
        what = f"diffusers' {kind.__name__} reads no adapter in {_SHOWN[layout]}"
        raise UserError(what, f"Its layouts: {', '.join(there)}.")
    for key in state:
        for beginning, what in _ADDED.items():
            if key.startswith(beginning):
                raise UserError(f"{shown} brings {what}, which {_SHOWN[layout]} cannot hold", _KEEP)
    if (other := layout_of(state)) != OWN_LAYOUT:
        raise UserError(f"{shown} is in another layout: {other}", "Give one in diffusers' layout.")
    parts = {key.partition(".")[0] for key in state}
    scaled = in_peft_names(state, {f"{part}.": _settings(part, settings, shown) for part in parts}, shown)
    scaled = {with_text_model(key): value for key, value in scaled.items()}
    ends = (_A, _B, _DORA) if kind is None else (_A, _B)
    if odd := next((key for key in scaled if not key.endswith(ends)), None):
        what = "DoRA" if odd.endswith(_DORA) else odd
        raise UserError(f"{shown} has {what}, which is not read back from {_SHOWN[layout]}", _KEEP)
    for layer in dict.fromkeys(map(layer_of, scaled)):
        down, up = (scaled.get(f"{layer}{end}") for end in (_A, _B))
        if down is None or up is None or len(down) != up.shape[1]:
            raise UserError(f"{shown} lacks a factor of {layer}, or its factors differ in the rank", MEND)
    if kind is None:
        return _of_ours(scaled, layout)
    scaled = _of_one_rank(scaled)
    written = _of_pretrained(scaled, layout, _network_class(kind), shown)
    _check_read_back(written, scaled, layout, kind, shown)
    return written


def write_in_layout(file: Path, target: Path, layout: str, kind: Any = None) -> None:
    """Write the adapter of a safetensors file in diffusers' layout to another file, in a layout of `LAYOUTS`.

    What our own files say of their base is kept.

    Raises:
        UserError: see `in_layout`.
    """
    with library_reads(shown := f"the adapter {file}"), safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata() or {})
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # no mapping
    settings = None
    if layout != OWN_LAYOUT and LORA_ADAPTER_METADATA_KEY in metadata:
        name = f"{shown}: its settings ({LORA_ADAPTER_METADATA_KEY})"
        # Taken out: from now on the tensors say it.
        settings = parse_json(metadata.pop(LORA_ADAPTER_METADATA_KEY), name, MEND)
        if not isinstance(settings, dict):
            raise UserError(f"{name} are no mapping", MEND)
    tensors = in_layout(state, settings, layout, kind, shown)
    save_tensors({key: value.contiguous() for key, value in tensors.items()}, target, metadata)


def _network_class(kind: Any) -> str:
    """Return the class name of a stock pipeline's network."""
    types = get_type_hints(kind.__init__)
    return str(getattr(types.get("transformer") or types.get("unet"), "__name__", ""))


def _settings(part: str, settings: Mapping[str, Any] | None, shown: str) -> dict[str, Any]:
    own = settings_of(part, settings)
    if own and not isinstance(own.get("lora_alpha"), int | float):
        raise UserError(f"{shown}: its settings for the {part} lack an alpha (lora_alpha)", MEND)
    return own


def with_text_model(key: str) -> str:
    """Return the name of CLIP's layer as all programs know it; from transformers 5 on some are shorter."""
    return re.sub(r"^((?:text_encoder(?:_2)?\.)?)encoder\.layers\.", r"\1text_model.encoder.layers.", key)


def _of_one_rank(state: Tensors) -> Tensors:
    """Return the tensors with zeros that bring all layers of a part to its largest rank.

    Some of diffusers' loaders scale layers of another rank wrongly: they take one alpha for all.
    """
    most: dict[str, int] = {}
    for key, value in state.items():
        part = key.partition(".")[0]
        most[part] = max(most.get(part, 0), value.shape[0 if key.endswith(_A) else 1])
    filled: Tensors = {}
    for key, value in state.items():
        side = 0 if key.endswith(_A) else 1
        shape = [*value.shape]
        shape[side] = most[key.partition(".")[0]] - shape[side]
        filled[key] = torch.cat([value, value.new_zeros(shape)], dim=side)
    return filled


def _of_ours(state: Tensors, layout: str) -> Tensors:
    """Return the tensors of one of our networks and its text encoder in kohya's or ComfyUI's layout."""
    named = {**state}
    for key in [key for key in named if key.endswith(_DORA)]:
        lengths = named.pop(key)  # (out,) or (1, out, 1, 1), for others (out, 1, ...)
        named[key.replace(_DORA, _LENGTHS)] = (
            lengths[:, None] if lengths.ndim == 1 else lengths.transpose(0, 1)
        )
    if layout == "kohya":
        return _kohya({re.sub(r"^transformer\.(unet\.)?", "unet.", key): v for key, v in named.items()})
    return {re.sub(r"^transformer\.", "diffusion_model.", key): value for key, value in named.items()}


def _of_pretrained(state: Tensors, layout: str, network: str, shown: str) -> Tensors:
    """Return the tensors of a pretrained model, whose network is of this class, in kohya's or ComfyUI's layout."""
    names = _KOHYA.get(network) if layout == "kohya" else _COMFYUI.get(network)
    lacking = _READ_BY_COMFYUI.get(network) if layout == "comfyui" else ""
    for layer in dict.fromkeys(map(layer_of, state)):
        part, _, inside = layer.partition(".")
        if lacking and part == "transformer" and re.search(lacking, inside):
            raise UserError(f"ComfyUI has no name for a layer of {shown}: {layer}", _KEEP)
    if names is not None:
        state = _original(state, names, layout, shown)
    if layout == "kohya" or network == "UNet2DConditionModel":
        return _kohya({re.sub(r"^transformer\.", "unet.", key): value for key, value in state.items()})
    if names is not None:
        return {re.sub(r"^transformer\.", "diffusion_model.", key): value for key, value in state.items()}
    return state


def _kohya(state: Tensors) -> Tensors:
    """Return tensors in kohya's layout, each layer's alpha its rank."""
    lengths = f"{_LENGTHS}.weight"  # the library counts on two dots at the end
    named = convert_state_dict_to_kohya({re.sub(f"{_LENGTHS}$", lengths, key): v for key, v in state.items()})
    return {re.sub(f"{lengths}$", _LENGTHS, key): value for key, value in named.items()}


def _original(state: Tensors, names: Names, layout: str, shown: str) -> Tensors:
    """Return tensors by the layers of a model's original network, some of which are several of diffusers'."""
    parts = {name: {layers: 1} if isinstance(layers, str) else layers for name, layers in names.items()}
    places = {part: name for name, shares in parts.items() for part in shares}
    found: dict[tuple[str, str], dict[str, Factors]] = {}  # by the name and the number of the block
    named: Tensors = {}
    for key, value in state.items():
        if not key.startswith("transformer."):
            named[key] = value
        elif key.endswith(_A):
            layer = key.removesuffix(_A)
            inside = layer.removeprefix("transformer.")
            block = re.search(r"\.(\d+)\.", inside)
            part = re.sub(r"\.\d+\.", ".N.", inside, count=1)
            if part not in places:
                raise UserError(f"{_SHOWN[layout]} has no name for a layer of {shown}: {layer}", _KEEP)
            place = places[part], block[1] if block else ""
            found.setdefault(place, {})[part] = (value, state[f"{layer}{_B}"])
    for (name, number), factors in found.items():
        layer = f"transformer.{name.replace('.N.', f'.{number}.')}"
        named[f"{layer}{_A}"], named[f"{layer}{_B}"] = _stacked(parts[name], factors)
    return named


def _stacked(shares: Mapping[str, int], factors: Mapping[str, Factors]) -> Factors:
    """Return the factors of a layer whose outputs are those of several, one after the other.

    The second factor is block-diagonal, which loaders take apart again without loss; the blocks of parts without an
    adapter are zero.
    """
    if len(shares) == 1:
        return next(iter(factors.values()))
    part, (down, up) = next(iter(factors.items()))
    unit = len(up) // shares[part]
    absent = {
        name: (torch.zeros_like(down), up.new_zeros(unit * share, up.shape[1]))
        for name, share in shares.items()
    }
    downs, ups = zip(*{**absent, **factors}.values(), strict=True)
    return torch.cat(downs), torch.block_diag(*ups)


def _check_read_back(written: Tensors, state: Tensors, layout: str, kind: Any, shown: str) -> None:
    """Refuse a layout from which the pipeline's own loader does not get every layer as it is."""
    fix = f"{_KEEP} Layouts for {kind.__name__}: {', '.join(layouts_of(kind))}."
    with without_reports(), library_reads(f"{shown} written in {_SHOWN[layout]}", fix=fix):
        read = kind.lora_state_dict({**written})
        changes = _changes(read[0] if isinstance(read, tuple) else read)
    for layer, change in _changes(state).items():
        there = changes.pop(layer, None)
        if there is None or (there - change).abs().max() > 1e-4 * change.abs().max():
            raise UserError(f"diffusers' {kind.__name__} does not read {layer} from {_SHOWN[layout]}", fix)
    if more := [layer for layer, change in changes.items() if change.any()]:
        raise UserError(
            f"diffusers' {kind.__name__} reads other layers from {_SHOWN[layout]}: {few(more)}", fix
        )


def _changes(state: Mapping[str, Tensor]) -> Tensors:
    """Return what each layer's factors make of a fixed vector."""
    named: Tensors = {}
    for part in {key.partition(".")[0] for key in state}:
        own = {key: value for key, value in state.items() if key.startswith(f"{part}.")}
        if part.startswith("text_encoder"):  # as diffusers' loader of text encoders does
            named |= convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
        else:
            named |= convert_unet_state_dict_to_peft(own)
    found: Tensors = {}
    for key, down in named.items():
        if key.endswith(_A):
            matrix = down.flatten(1).float()
            vector = torch.arange(1.0, 1.0 + matrix.shape[1]).cos()
            found[key.removesuffix(_A)] = named[key.replace(_A, _B)].flatten(1).float() @ (matrix @ vector)
    return found
