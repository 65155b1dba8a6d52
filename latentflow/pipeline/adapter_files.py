"""Files of adapters (LoRA, DoRA): diffusers' format, and the facts that ours hold beside it.

A file of ours names the base that it was made for, and brings the words and classes that the base does not know: for
each the distance of its embedding from the mean of the base's, which is where training began.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, _fetch_state_dict
from diffusers.utils.hub_utils import _get_model_file
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or its successor's
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import UserError, reading, reason
from ..families.few_steps import FewSteps
from ..models import ControlInputs
from ..utils.components import about, is_finite, without_reports
from ..utils.files import MEND, check_settings, check_types, parse_json, read_settings, save_tensors
from .adapter_layouts import OWN_LAYOUT, in_peft_names, layer_of, layout_of, model_of

Tensors: TypeAlias = dict[str, Tensor]
#: how a network is sampled, and the parameters of the embedder of an interval's length that it is given for that
SamplingMode: TypeAlias = tuple[FewSteps, Tensors]
#: the control images that a network is made to take, as `ControlInputs.plain` has them, and the parameters for that
ControlPart: TypeAlias = tuple[dict[str, Any], Tensors]
PARTS = ("transformer", "text_encoder")  # of a pipeline, that adapters change
METADATA_KEY = "latentflow"  # of `AdapterFacts` among a safetensors file's metadata
WORDS, CLASSES = "added.words", "added.classes"  # tensors (K, D) of a file
INTERVALS = "added.intervals."  # and a parameter's name: of the embedder of an interval's length, which the base lacks
CONTROL = "added.control."  # and a parameter's name: of what takes control images, which the base lacks
# weights of a pretrained model's input channels, which the base lacks, by their kind and by the coupling of masks; see
# `latentflow.families.added_inputs`
INPUTS = {
    ("masks", "independent"): "added.masks",
    ("masks", "data-dependent"): "added.masks.data-dependent",
    ("control", "independent"): f"{CONTROL}weight",
    ("labels", "independent"): f"{CONTROL}labels.weight",
    ("table", "independent"): f"{CONTROL}labels.table",  # the embeddings of labels
}
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
_PLACE = (
    "weight_name", "subfolder", "local_files_only", "cache_dir", "force_download", "proxies", "token", "revision"
)  # fmt: skip
_USER_AGENT = {"file_type": "attn_procs_weights", "framework": "pytorch"}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_PEFT_CONFIG = "adapter_config.json"  # beside peft's own files
_THEIRS = "lora_adapter_metadata"  # under which peft's settings are among a file's metadata
# A setting, and the tensor of each layer that it brings.
_MORE = {"use_dora": "lora_magnitude_vector", "lora_bias": "lora_B.bias"}
# The side of a tensor that must be as long as its layer's weight, and what it counts.
_INPUTS = ".lora_A.weight"
_SIDES = {_INPUTS: (1, "inputs"), ".lora_B.weight": (0, "outputs")}
_SIDES |= dict.fromkeys((WORDS, CLASSES), (1, "columns"))
_FOR_EACH_OUTPUT = (".lora_magnitude_vector", ".lora_B.bias")
# The two halves of a layer, and of an embedding.
_HALVES = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """The facts in a file of ours beyond diffusers' format.

    Attributes:
        base: type of numbers -> hash of the base's network in it, see `base_hashes`; of a pretrained model:
            `fingerprint`.
        base_name: what the base was called, see `shared_name`.
        words, classes: what the base does not know, in the order of the rows.
        few_steps: how the network is sampled with the adapter, as `FewSteps.plain` has it; empty: as without.
        control: the control images that it is made to take, as `ControlInputs.plain` has them; empty: as without.
    """

    base: dict[str, str] = field(default_factory=dict)
    base_name: str = ""
    words: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    few_steps: dict[str, Any] = field(default_factory=dict)
    control: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return plain values; those of control images where there are any, which earlier versions did not know."""
        return {name: value for name, value in asdict(self).items() if name != "control" or value}

    def metadata(self) -> dict[str, str]:
        """Return the facts as an entry of a safetensors file's metadata."""
        return {METADATA_KEY: json.dumps(self.plain())}


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
) -> tuple[dict[str, Tensor], dict[str, Any] | None, AdapterFacts, str]:
    """Read an adapter: tensors by peft's names, settings as diffusers keeps them, our facts, and a note on its origin.

    The note is for messages: the layout of the file, and the well-known model that it is of.

    Raises:
        UserError: there is no such file, or it is damaged, holds numbers that are not finite, or is no LoRA.
    """
    wanted = {name: options.get(name) for name in _PLACE}
    if isinstance(source, os.PathLike):
        source = str(source)
    for name in (source, wanted["weight_name"]):
        if isinstance(name, str) and name.lower().endswith(_PICKLES) and not Path(name).is_dir():
            raise UserError(
                f"{shown}: {Path(name).name} is a pickle, which runs code when it is opened",
                "Only .safetensors files are read.",
            )
    if wanted["weight_name"] and not wanted["weight_name"].endswith(".safetensors"):
        raise UserError(
            f"weight_name {wanted['weight_name']} is no .safetensors file", "Others are not read."
        )
    there = isinstance(source, dict) or Path(source).exists()
    folder = None if isinstance(source, dict) else Path(source, wanted["subfolder"] or "")
    if folder is not None and folder.is_dir() and not wanted["weight_name"]:
        wanted["weight_name"] = _file_in(folder, shown)
    try:
        state, metadata, file_metadata = _fetch(source, wanted)
    except (OSError, ValueError, TypeError, LookupError, RecursionError, SafetensorError, HTTPError) as error:
        what = "could not be read" if there else "is no file or folder here, and was not found on the hub"
        raise UserError(
            f"{shown} {what}: {reason(error)}",
            "Give a folder with pytorch_lora_weights.safetensors, that file, or a hub id.",
        ) from error
    with about(shown):
        facts = facts_of(file_metadata)
    if not isinstance(metadata, dict) and (metadata is not None or _THEIRS in (file_metadata or {})):
        raise UserError(f"{shown}: its settings ({_THEIRS}) are {metadata or 'empty'}", MEND)
    if any(key.endswith(".alpha") for key in state):
        metadata = None  # the tensors say it
    layout = layout_of(state)
    state = in_peft_names(state, _settings_of_scale(source, wanted, layout, metadata, shown), shown)
    odd = next((key for key, value in state.items() if not _is_sound(value)), None)
    if odd is not None:
        raise UserError(f"{shown}: {odd} is not of finite floating-point numbers", MEND)
    settings = {
        f"{part}.{name}": value
        for part in PARTS
        for name, value in settings_of(part, metadata).items()
        if name in _SETTINGS
    }
    for part in PARTS:
        _check_settings(settings_of(part, settings), f"{shown}: the settings for its {part}")
        narrower = any((metadata or {}).get(f"{part}.{name}") not in (None, [], "") for name in _NARROWER)
        if narrower and isinstance(settings.get(f"{part}.target_modules"), list):
            held = {key.partition(".lora")[0] for key in state if key.startswith(f"{part}.")}
            settings[f"{part}.target_modules"] = sorted(layer.removeprefix(f"{part}.") for layer in held)
    model = model_of(state, file_metadata)
    note = ", ".join([f"layout: {layout}"] * (layout != OWN_LAYOUT) + [f"made for {model}"] * bool(model))
    return state, settings or None, facts, note


def read_facts(source: Any, shown: str, options: Mapping[str, Any]) -> AdapterFacts:
    """Read our facts from an adapter's file of any family; there are none in other files, nor in what is no file.

    Args:
        source, shown, options: see `read_adapter`.

    Raises:
        UserError: they are damaged.
    """
    if isinstance(source, Mapping):
        return AdapterFacts()
    try:
        with without_reports():
            *_, file_metadata = _fetch(str(source), {name: options.get(name) for name in _PLACE})
    except (OSError, ValueError, TypeError, LookupError, RecursionError, SafetensorError, HTTPError):
        return AdapterFacts()  # the family's own loader says what is wrong, or reads a file of another kind
    with about(shown):
        return facts_of(file_metadata)


@contextmanager
def without_inputs(
    source: Any, options: dict[str, Any]
) -> Iterator[tuple[Any, dict[str, Any], dict[tuple[str, str], Tensor]]]:
    """Yield an adapter as diffusers' own loaders take it, their options, and its weights of input channels, by their
    kinds and couplings.

    Args:
        source, options: see `read_adapter`.
    """
    place = {name: options.get(name) for name in _PLACE}
    try:
        with without_reports():
            tensors, _, metadata = _fetch(source if isinstance(source, Mapping) else str(source), place)
    except (OSError, ValueError, TypeError, LookupError, RecursionError, SafetensorError, HTTPError):
        tensors, metadata = {}, None  # as in `read_facts`
    inputs = {key: tensors[name] for key, name in INPUTS.items() if name in tensors}
    rest = {name: value for name, value in tensors.items() if name not in INPUTS.values()}
    if not inputs:
        yield source, options, {}
    elif isinstance(source, Mapping):
        yield rest, options, inputs
    else:
        with TemporaryDirectory() as folder:
            save_tensors(rest, Path(folder) / LORA_WEIGHT_NAME_SAFE, metadata)
            yield folder, {name: value for name, value in options.items() if name not in _PLACE}, inputs


def _fetch(source: Any, place: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return the tensors of a safetensors file or of a dict, peft's settings, and the metadata of the file."""
    found: tuple[Any, Any, Any] = _fetch_state_dict(
        source,
        use_safetensors=True,
        user_agent=_USER_AGENT,
        allow_pickle=False,
        return_file_metadata=True,
        **place,
    )
    return found


def _is_sound(value: Tensor) -> bool:
    return value.is_floating_point() and (not value.numel() or is_finite(value))


def _settings_of_scale(
    source: Any,
    place: Mapping[str, Any],
    layout: str,
    metadata: Mapping[str, Any] | None,
    shown: str,
) -> dict[str, dict[str, Any]]:
    """Return peft's settings of the scale by the beginning of the layers' names, from where other trainers write them:
    for `in_peft_names`.

    Those in diffusers' own place are for peft, which applies them itself. kohya's ``ss_network_alpha`` only describes
    the training: converters that multiply the scale into the tensors leave it in the file.
    """
    where, beginning = "its settings", ""
    if config := settings_of("unet", metadata):
        beginning = "unet."
    elif any(settings_of(part, metadata) for part in PARTS):
        return {}
    elif layout == "peft" and isinstance(source, str):
        config = _beside(source, place)
        if config.get("peft_type", "LORA") != "LORA":
            raise UserError(
                f"{shown} is no LoRA adapter: {_PEFT_CONFIG} has peft_type {config['peft_type']}",
                "LoRA and DoRA are read.",
            )
        where = _PEFT_CONFIG
    else:
        config = dict(metadata or {})
    config = {name: value for name, value in config.items() if name in _SETTINGS and value is not None}
    _check_settings(config, f"{shown}: {where}")
    return {beginning: config}


def _beside(source: str, place: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that peft writes beside its file, or nothing where there are none."""
    folder = str(Path(source).parent) if Path(source).is_file() else source
    options = {name: value for name, value in place.items() if name != "weight_name"}
    try:
        file = _get_model_file(folder, weights_name=_PEFT_CONFIG, user_agent=_USER_AGENT, **options)
    except (OSError, HTTPError):
        return {}
    return read_settings(Path(file))


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
                also = " and the file's settings" if given else ""
                raise UserError(
                    f"{shown}: the tensors of {layer}{also} differ in the rank: "
                    f"{' and '.join(map(str, sorted(ranks)))}",
                    MEND,
                )
            if 0 in ranks:
                raise UserError(f"{shown}: {layer} has rank 0", MEND)


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
    own = {key: value for key, value in state.items() if not key.startswith((INTERVALS, CONTROL))}
    of_text = [key for key in own if key.startswith(("text_encoder.", WORDS))]
    if of_text and "text_encoder" not in parts:
        if parts["transformer"].config.get("text_dim") is None:  # type: ignore[operator, union-attr]
            raise UserError(f"{shown} adapts a text encoder ({of_text[0]}), and this pipeline has none", fix)
        own = {key: value for key, value in own.items() if key not in of_text}  # loaded without
    weights = _weights(layers, dict.fromkeys(map(layer_of, own)), shown, fix)
    for key, value in own.items():
        layer = layer_of(key)
        weight = weights[layer]
        if weight.ndim < 2:
            raise UserError(f"{shown} is for another architecture: {layer} is no layer that is adapted", fix)
        end = next((end for end in _SIDES if key.endswith(end)), "")
        side, what = _SIDES.get(end, (0, "outputs"))
        there: int | None = weight.shape[side]
        if end:
            kernel = weight.shape[2:] if end == _INPUTS else (1,) * (weight.ndim - 2)  # of a convolution
            there = value.shape[side] if value.ndim == weight.ndim and value.shape[2:] == kernel else None
        elif key.endswith(_FOR_EACH_OUTPUT):
            there = value.numel()
        here = weight.shape[side]
        if there != here:
            width = parts["transformer"].config.get("width")  # type: ignore[operator, union-attr]
            of_width = f" (width {there}, here {here})" if there and end == _INPUTS and here == width else ""
            raise UserError(
                f"{shown} is for another architecture{of_width}: {layer} has {there or tuple(value.shape)} {what} "
                f"there, {here} here",
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


def _weights(
    layers: Mapping[str, nn.Module], wanted: Iterable[str], shown: str, fix: str
) -> dict[str, Tensor]:
    """Return the weight of each layer that is wanted.

    Raises:
        UserError: some are not there; says how many are, and names one that is not.
    """
    found = {layer: getattr(layers.get(layer), "weight", None) for layer in wanted}
    weights = {layer: weight for layer, weight in found.items() if weight is not None}
    if absent := [layer for layer in found if layer not in weights]:
        what = f"its layer {absent[0]} is"
        if len(found) > 1:
            what = f"{len(weights) or 'none'} of its {len(found)} layers fit, {absent[0]} is"
        raise UserError(f"{shown} is for another architecture: {what} not in this network", fix)
    return weights


def _file_in(folder: Path, shown: str) -> str:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in _PICKLES]
        only = f", only {pickles[0]}, a pickle, which runs code when it is opened" if pickles else ""
        raise UserError(f"{shown} holds no .safetensors file{only}", "A run's adapter is in RUN/adapter.")
    usual = [name for name in (str(LORA_WEIGHT_NAME_SAFE), "adapter_model.safetensors") if name in files]
    if len(files) > 1 and not usual:
        raise UserError(f"{shown} holds several adapters: {', '.join(files)}", "Give the path of one.")
    return [*usual, *files][0]


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


def take_control(
    state: MutableMapping[str, Tensor], facts: AdapterFacts, network: Any, shown: str, *, has_own: bool
) -> ControlPart | None:
    """Take the part that makes the network take control images out of ``state``, and return it; None: there is none.

    Args:
        has_own: the network takes control images without adapters.

    Raises:
        UserError: it does not fit the network, which may have its own; or is no such part.
    """
    tensors = {key.removeprefix(CONTROL): state.pop(key) for key in [*state] if key.startswith(CONTROL)}
    if not tensors and not facts.control:
        return None
    fix = f"Load it onto {facts.base_name or 'the checkpoint'} that it was trained from."
    if has_own:
        raise UserError(f"{shown} brings inputs for control images, and this checkpoint has its own", fix)
    if not facts.control:
        raise UserError(
            f"{shown} brings inputs for control images, and does not say of which kind",
            "The file that training wrote says it, its tensors do not: load that file.",
        )
    with about(shown):
        inputs = ControlInputs.of(facts.control)
        made = network.new_control_embedder(facts.control).state_dict()
    fits = {name: value.shape for name, value in made.items()} == {
        name: value.shape for name, value in tensors.items()
    }
    if not fits or inputs.image not in (0, network.config["in_channels"]):
        raise UserError(
            f"{shown} is for another architecture: its inputs for control images do not fit this one", fix
        )
    return facts.control, tensors
