"""Files of adapters (LoRA, DoRA): diffusers' format, and what ours say beside it.

A file of ours tells which base it was made for, and brings the words and classes that the base does not know: of each
the distance of its embedding from the mean of the base's, which is where training began.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, _fetch_state_dict
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or its successor's
from safetensors import SafetensorError
from torch import Tensor, nn

from .documents import parse_json
from .errors import UserError

PARTS = ("transformer", "text_encoder")  # of a pipeline, that adapters change
METADATA_KEY = "latentflow"  # of `AdapterFacts` among a safetensors file's metadata
WORDS, CLASSES = "added.words", "added.classes"  # tensors (K, D) of a file
INTERVALS = "added.intervals."  # and a parameter's name: of the embedder of an interval's length, which the base lacks
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of a file's settings those that say what its tensors mean. peft has others, some of which import what they name.
_SETTINGS = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora", "use_rslora", "lora_bias"
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """What a file of ours says beyond diffusers' format.

    Attributes:
        base: type of numbers -> hash of the base's network in it, see `base_hashes`.
        base_name: what the base was called.
        words, classes: what the base does not know, in the order of the rows.
        few_steps: how the network is followed with the adapter, as `FewSteps.plain` has it; empty: as without.
    """

    base: dict[str, str] = field(default_factory=dict)
    base_name: str = ""
    words: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    few_steps: dict[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """As an entry of a safetensors file's metadata."""
        return {METADATA_KEY: json.dumps(asdict(self))}


def facts_of(metadata: Mapping[str, str] | None) -> AdapterFacts:
    """What `AdapterFacts.metadata` wrote; nothing of a file that others made.

    Raises:
        TypeError, ValueError: it did not write this.
    """
    facts = AdapterFacts(**parse_json((metadata or {}).get(METADATA_KEY, "{}"), "its metadata"))
    for name, empty in asdict(AdapterFacts()).items():
        if type(getattr(facts, name)) is not type(empty):
            raise ValueError(f"{name} of its facts is no {type(empty).__name__}")
    return facts


def base_hashes(network: nn.Module) -> dict[str, str]:
    """The hash of a network's weights, rounded to each type of numbers in which pipelines are loaded."""
    return {type_name(dtype): weights_hash(network, dtype) for dtype in _DTYPES}


def weights_hash(network: nn.Module, dtype: torch.dtype = torch.float32) -> str:
    """The hash of a network's weights in this type of numbers, without adapters."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if "lora_" not in name:
            digest.update(f"{name.replace('.base_layer', '')} {tuple(value.shape)}".encode())
            raw = value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)
            digest.update(raw.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def type_name(dtype: torch.dtype) -> str:
    """As in `AdapterFacts.base`."""
    return str(dtype).removeprefix("torch.")


def read_adapter(
    source: Any, shown: str, options: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any] | None, AdapterFacts]:
    """Tensors, settings as diffusers keeps them, and our facts.

    Raises:
        UserError: there is no such file, or it is damaged, or no adapter.
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
        facts = facts_of(file_metadata)
    except (OSError, ValueError, TypeError, LookupError, SafetensorError, HTTPError) as error:
        what = (
            "could not be read" if there else "is no file or folder here, and could not be had from the hub"
        )
        raise UserError(
            f"{shown} {what}: {str(error).strip().partition(chr(10))[0]}",
            "Give a folder with pytorch_lora_weights.safetensors, that file, or a hub id.",
        ) from error
    state = dict(state)
    if not state or not all("lora" in key or key.startswith((WORDS, CLASSES, INTERVALS)) for key in state):
        raise UserError(
            f"{shown} is no adapter: it holds other weights", "A run's adapter is in RUN/adapter."
        )
    settings = {name: one for name, one in (metadata or {}).items() if name.rpartition(".")[2] in _SETTINGS}
    return state, settings or None, facts


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
    """Takes the rows of new words or classes out of ``state``; by name."""
    rows = state.pop(key, torch.empty(0))
    if len(rows) != len(names):
        raise UserError(
            f"{shown} has {len(rows)} rows of {key} and {len(names)} names for them",
            "The names are in the file that training wrote, not in its tensors: load that file.",
        )
    return dict(zip(names, rows, strict=True))
