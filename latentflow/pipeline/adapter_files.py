"""Files of adapters (LoRA, DoRA): diffusers' format, and the facts that ours hold beside it.

A file of ours names the base that it was made for, and brings the words and classes that the base does not know: for
each the distance of its embedding from the mean of the base's, which is where training began.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, _fetch_state_dict
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or its successor's
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import UserError, reading, reason
from ..families.few_steps import FewSteps
from ..utils.components import about, is_finite
from ..utils.files import MEND, check_settings, check_types, parse_json

Tensors: TypeAlias = dict[str, Tensor]
#: how a network is sampled, and the parameters of the embedder of an interval's length that it is given for that
SamplingMode: TypeAlias = tuple[FewSteps, Tensors]
PARTS = ("transformer", "text_encoder")  # of a pipeline, that adapters change
METADATA_KEY = "latentflow"  # of `AdapterFacts` among a safetensors file's metadata
WORDS, CLASSES = "added.words", "added.classes"  # tensors (K, D) of a file
INTERVALS = "added.intervals."  # and a parameter's name: of the embedder of an interval's length, which the base lacks
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of a file's settings those that say what its tensors mean. peft has others, some of which import what they name.
_SETTINGS: dict[str, Any] = {
    "r": int,
    "lora_alpha": float,
    "rank_pattern": dict[str, int],
    "alpha_pattern": dict[str, float],
    "target_modules": list[str] | str | None,
    "use_dora": bool,
    "use_rslora": bool,
    "lora_bias": bool,
}
# Settings of peft's that leave out some of the layers which target_modules names.
_NARROWER = ("exclude_modules", "layers_to_transform")
_THEIRS = "lora_adapter_metadata"  # under which peft's settings are among a file's metadata
# A setting, and the tensor of each layer that it brings.
_MORE = {"use_dora": "lora_magnitude_vector", "lora_bias": "lora_B.bias"}
# The side of a tensor that must be as long as its layer's weight, and what it counts.
_SIDES = {".lora_A.weight": (1, "inputs"), ".lora_B.weight": (0, "outputs")}
_SIDES |= {".lora.down.weight": (1, "inputs"), ".lora.up.weight": (0, "outputs")}  # diffusers' older spelling
_SIDES |= dict.fromkeys((WORDS, CLASSES), (1, "columns"))
_FOR_EACH_OUTPUT = (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".lora_B.bias")
# The two halves of a layer, in peft's spelling, of embeddings, and in an older one of diffusers.
_HALVES = {
    "lora_A.weight": "lora_B.weight",
    "lora_embedding_A": "lora_embedding_B",
    "lora.down.weight": "lora.up.weight",
}


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """The facts in a file of ours beyond diffusers' format.

    Attributes:
        base: type of numbers -> hash of the base's network in it, see `base_hashes`.
        base_name: what the base was called.
        words, classes: what the base does not know, in the order of the rows.
        few_steps: how the network is sampled with the adapter, as `FewSteps.plain` has it; empty: as without.
    """

    base: dict[str, str] = field(default_factory=dict)
    base_name: str = ""
    words: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    few_steps: dict[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """Return the facts as an entry of a safetensors file's metadata."""
        return {METADATA_KEY: json.dumps(asdict(self))}


def facts_of(metadata: Mapping[str, str] | None) -> AdapterFacts:
    """Read what `AdapterFacts.metadata` wrote; from a file that others made, nothing.

    Raises:
        UserError: it did not write this.
    """
    facts = parse_json((metadata or {}).get(METADATA_KEY, "{}"), f"its metadata '{METADATA_KEY}'", MEND)
    if not isinstance(facts, dict):
        raise UserError(f"its metadata '{METADATA_KEY}' are a {type(facts).__name__}", MEND)
    check_settings(f"its metadata '{METADATA_KEY}'", facts, AdapterFacts)
    return AdapterFacts(**facts)


def base_hashes(network: nn.Module) -> dict[str, str]:
    """Return the hash of a network's weights, rounded to each type of numbers in which pipelines are loaded."""
    return {type_name(dtype): weights_hash(network, dtype) for dtype in _DTYPES}


def weights_hash(network: nn.Module, dtype: torch.dtype = torch.float32) -> str:
    """Return the hash of a network's weights in this type of numbers, without adapters."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if "lora_" not in name:
            digest.update(f"{name.replace('.base_layer', '')} {tuple(value.shape)}".encode())
            raw = value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)
            digest.update(raw.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def type_name(dtype: torch.dtype) -> str:
    """Return the name of a type of numbers, as in `AdapterFacts.base`."""
    return str(dtype).removeprefix("torch.")


def read_adapter(
    source: Any, shown: str, options: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any] | None, AdapterFacts]:
    """Read an adapter: tensors, settings as diffusers keeps them, and our facts.

    Raises:
        UserError: there is no such file, or it is damaged, holds numbers that are not finite, or is no adapter.
    """
    names = ("weight_name", "local_files_only", "cache_dir", "force_download", "proxies", "token", "revision")
    wanted: dict[str, Any] = {name: options.get(name) for name in (*names, "subfolder")}
    if isinstance(source, os.PathLike):
        source = str(source)
    if wanted["weight_name"] and not wanted["weight_name"].endswith(".safetensors"):
        raise UserError(
            f"weight_name {wanted['weight_name']} is no .safetensors file", "Others are not read."
        )
    there = isinstance(source, dict) or Path(source).exists()
    folder = None if isinstance(source, dict) else Path(source, wanted["subfolder"] or "")
    if folder is not None and folder.is_dir() and not wanted["weight_name"]:
        wanted["weight_name"] = _file_in(folder, shown)
    try:
        state, metadata, file_metadata = _fetch_state_dict(
            source,
            use_safetensors=True,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            allow_pickle=False,
            return_file_metadata=True,
            **wanted,
        )
    except (OSError, ValueError, TypeError, LookupError, RecursionError, SafetensorError, HTTPError) as error:
        what = "could not be read" if there else "is no file or folder here, and was not found on the hub"
        raise UserError(
            f"{shown} {what}: {reason(error)}",
            "Give a folder with pytorch_lora_weights.safetensors, that file, or a hub id.",
        ) from error
    with about(shown):
        facts = facts_of(file_metadata)
    state = dict(state)
    other = [key for key in state if "lora" not in key and not key.startswith((WORDS, CLASSES, INTERVALS))]
    if other or not state:
        raise UserError(
            f"{shown} is no adapter: it holds " + (f"other weights, such as {other[0]}" if other else "none"),
            "A run's adapter is in RUN/adapter.",
        )
    odd = [
        key
        for key, value in state.items()
        if not value.is_floating_point() or (value.numel() and not is_finite(value))
    ]
    if odd:
        raise UserError(f"{shown}: {odd[0]} is not of finite floating-point numbers", MEND)
    if not isinstance(metadata, dict) and (metadata is not None or _THEIRS in (file_metadata or {})):
        raise UserError(f"{shown}: its settings ({_THEIRS}) are {metadata or 'empty'}", MEND)
    settings = {
        name: value for name, value in (metadata or {}).items() if name.rpartition(".")[2] in _SETTINGS
    }
    for part in PARTS:
        _check_settings(settings_of(part, settings), f"{shown}: the settings for its {part}")
        narrower = any((metadata or {}).get(f"{part}.{name}") not in (None, [], "") for name in _NARROWER)
        if narrower and isinstance(settings.get(f"{part}.target_modules"), list):
            held = {key.partition(".lora")[0] for key in state if key.startswith(f"{part}.")}
            settings[f"{part}.target_modules"] = sorted(layer.removeprefix(f"{part}.") for layer in held)
    return state, settings or None, facts


def settings_of(part: str, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings of a file for one part of a pipeline, by their names in peft."""
    prefix = f"{part}."
    return {
        key.removeprefix(prefix): value for key, value in (settings or {}).items() if key.startswith(prefix)
    }


def _check_settings(settings: Mapping[str, Any], shown: str) -> None:
    check_types(shown, settings, _SETTINGS)
    if not settings:
        return  # a file without any: its tensors say it all
    numbers = [settings.get("r", 0), settings.get("lora_alpha", 0)]
    numbers += [*settings.get("rank_pattern", {}).values(), *settings.get("alpha_pattern", {}).values()]
    if min(numbers) <= 0:
        raise UserError(f"{shown} lack a rank (r) or an alpha (lora_alpha) above 0", MEND)
    for pattern in (*settings.get("rank_pattern", {}), *settings.get("alpha_pattern", {})):
        with reading(f"{shown}: the pattern {pattern!r}", re.error, RecursionError, OverflowError, fix=MEND):
            re.compile(pattern)


def check_tensors(state: Mapping[str, Tensor], settings: Mapping[str, Any] | None, shown: str) -> None:
    """Refuse an adapter that lacks a tensor of a layer, or whose tensors or settings differ in the rank.

    Args:
        state: its tensors.
        settings: see `read_adapter`.
        shown: what it is called.

    Raises:
        UserError: names the layer.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        layer, dot, kind = key.partition(".lora")
        if dot:
            layers.setdefault(layer, {})[f"lora{kind}"] = value
    for part in PARTS:
        own = {layer: held for layer, held in layers.items() if layer.startswith(f"{part}.")}
        kinds = dict.fromkeys(kind for held in own.values() for kind in held)
        for down, up in _HALVES.items():
            if down in kinds or up in kinds:
                kinds |= dict.fromkeys((down, up))
        given = settings_of(part, settings)
        for name, kind in _MORE.items():
            if own and given and given.get(name, False) != any(held.startswith(kind) for held in kinds):
                raise UserError(
                    f"{shown}: {name} is {given.get(name, False)}, and its tensors say the opposite", MEND
                )
        for layer, tensors in own.items():
            missing = [kind for kind in kinds if kind not in tensors]
            if missing:
                raise UserError(f"{shown} lacks a part of a layer: {layer}.{missing[0]}", MEND)
            ranks = {tensors[down].shape[0] for down in _HALVES if down in tensors}
            ranks |= {tensors[up].shape[1] for up in _HALVES.values() if up in tensors}
            if given:
                patterns = given.get("rank_pattern", {}).items()
                path = layer.removeprefix(f"{part}.")
                # As peft reads them.
                ranks.add(next((r for key, r in patterns if re.match(rf"(.*\.)?({key})$", path)), given["r"]))
            if len(ranks) > 1:
                raise UserError(
                    f"{shown}: the tensors of {layer} and the file's settings differ in the rank: "
                    f"{' and '.join(map(str, sorted(ranks)))}",
                    MEND,
                )


def check_architecture(
    parts: Mapping[str, nn.Module],
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any] | None,
    shown: str,
    facts: AdapterFacts,
) -> None:
    """Refuse an adapter that does not fit the networks it is loaded onto, or is not whole.

    Args:
        parts: those of `PARTS` that are loaded; what is for another is passed over.
        state, settings, shown: as of `check_tensors`.

    Raises:
        UserError: names the layer.
    """
    fix = f"Load it onto {facts.base_name or 'the checkpoint'} that it was trained from."
    layers = {
        f"{part}.{name}": layer for part, whole in parts.items() for name, layer in whole.named_modules()
    }
    if "text_encoder" in parts:
        layers[WORDS] = parts["text_encoder"].get_input_embeddings()  # type: ignore[operator]
    if getattr(parts["transformer"], "y_embedder", None) is not None:
        layers[CLASSES] = parts["transformer"].y_embedder.embedding_table  # type: ignore[union-attr]
    for key, value in state.items():
        if key.startswith(INTERVALS) or (
            "text_encoder" not in parts and key.startswith(("text_encoder.", WORDS))
        ):
            continue
        layer = key.rpartition(".lora")[0] or key
        weight = getattr(layers.get(layer), "weight", None)
        if weight is None:
            raise UserError(f"{shown} is for another architecture: there is no layer {layer} here", fix)
        if weight.ndim < 2:
            raise UserError(f"{shown} is for another architecture: {layer} is no layer that is adapted", fix)
        end = next((end for end in _SIDES if key.endswith(end)), "")
        side, what = _SIDES.get(end, (0, "outputs"))
        there: int | None = weight.shape[side]
        if end:
            there = value.shape[side] if value.ndim == weight.ndim else None
        elif key.endswith(_FOR_EACH_OUTPUT):
            there = value.numel()
        if there != weight.shape[side]:
            raise UserError(
                f"{shown} is for another architecture: {layer} has {there or tuple(value.shape)} {what} there, "
                f"{weight.shape[side]} here",
                fix,
            )
    check_tensors(state, settings, shown)
    held = {key.partition(".lora")[0] for key in state}
    for part, whole in parts.items():
        targets = settings_of(part, settings).get("target_modules")
        for name, module in whole.named_modules() if isinstance(targets, list) else ():
            path = name.replace(".base_layer", "")
            named = any(path == target or path.endswith(f".{target}") for target in targets or ())
            if named and isinstance(getattr(module, "weight", None), Tensor) and f"{part}.{path}" not in held:
                raise UserError(f"{shown} lacks a layer that its target_modules name: {part}.{path}", MEND)


def _file_in(folder: Path, shown: str) -> str:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{shown} holds no .safetensors file", "A run's adapter is in RUN/adapter.")
    usual = str(LORA_WEIGHT_NAME_SAFE)
    if len(files) > 1 and usual not in files:
        raise UserError(f"{shown} holds several adapters: {', '.join(files)}", "Give the path of one.")
    return usual if usual in files else files[0]


def take_rows(
    state: MutableMapping[str, Tensor], key: str, names: Sequence[str], shown: str
) -> dict[str, Tensor]:
    """Take the rows of new words or classes out of ``state``; return them by name.

    Raises:
        UserError: there are not as many rows as names.
    """
    rows = state.pop(key, torch.empty(0))
    if len(rows) != len(names):
        raise UserError(
            f"{shown} has {len(rows)} rows of {key} and {len(names)} names for them",
            "The names are in the file that training wrote, not in its tensors: load that file.",
        )
    return dict(zip(names, rows, strict=True))


def take_mode(
    state: MutableMapping[str, Tensor], facts: AdapterFacts, network: Any, shown: str
) -> SamplingMode:
    """Take the parameters of the adapter's sampling mode out of ``state``; return the mode.

    Raises:
        UserError: it does not fit the network, or is no such mode.
    """
    names = [key for key in state if key.startswith(INTERVALS)]
    intervals = {key.removeprefix(INTERVALS): state.pop(key) for key in names}
    fix = f"Load it onto {facts.base_name or 'the checkpoint'} that it was trained from."
    try:
        few = FewSteps.of(facts.few_steps)
    except (TypeError, UserError) as error:
        raise UserError(f"{shown} does not say how it is sampled: {error}", "Train it again.") from error
    if few.average and not intervals and not network.config.get("interval_conditioning"):
        raise UserError(f"{shown} was made for a network that takes the end of an interval", fix)
    if intervals and not few:
        raise UserError(f"{shown} does not say how it is sampled, though it knows of intervals", MEND)
    if intervals:
        make = getattr(network, "new_length_embedder", None)
        own = {} if make is None else {name: value.shape for name, value in make().state_dict().items()}
        if own != {name: value.shape for name, value in intervals.items()}:
            raise UserError(
                f"{shown} is for another architecture: what it knows of intervals does not fit this network",
                fix,
            )
    return few, intervals
