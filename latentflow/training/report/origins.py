"""Checkpoints and data sets that a model was made from, as its card names them.

The hub links every id in a card's header, so only what was fetched from the hub is given as one: `runs/cats` looks like
an id and is none. The folders of the author's disk are no reader's business: of a local checkpoint the name is given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache

from ...errors import UserError
from ...utils.files import SHIPPED_CHECKPOINTS, read_yaml, result_of

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
_DATA = re.compile(r"hub:([\w.-]+/[\w.-]+)(:.+)?")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A checkpoint, adapter or data set that a model was made from.

    Attributes:
        name: the name by which readers know it.
        place: what loads it: a hub id, `checkpoints/emoji-64`, or the name of a folder that readers have to get.
        hub_id: its id on the hub; "" for what was not fetched from there.
        license: the licence that its card states; "": it states none.
    """

    name: str
    place: str
    hub_id: str = ""
    license: str = ""


def checkpoint_origin(source: str) -> Origin:
    """Return the origin that a pipeline folder, run folder, adapter (its folder or file) or hub id is."""
    folder = Path(result_of(source)).expanduser()
    if not folder.exists():
        files = ("model_index.json", ADAPTER_FILE)
        found = [file for name in files if (file := _cached(source, name))]
        if not found:  # gone, or a hub id whose files are no longer there to prove it
            name = _name(folder)
            return Origin(name=name, place=name)
        return Origin(name=source, place=source, hub_id=source, license=_license(found[0].parent))
    resolved = folder.resolve()
    if resolved.is_file():  # an adapter's
        resolved = resolved.parent if resolved.name == ADAPTER_FILE else resolved.with_suffix("")
    name = _name(resolved)
    if resolved.is_relative_to(SHIPPED_CHECKPOINTS.resolve()):
        place = f"{SHIPPED_CHECKPOINTS.name}/{resolved.relative_to(SHIPPED_CHECKPOINTS.resolve()).as_posix()}"
        return Origin(name=name, place=place, license=_license(resolved))
    return Origin(name=name, place=name, license=_license(resolved))


def _name(folder: Path) -> str:
    """Return the name of a checkpoint's folder; of one in a run, the run's."""
    return folder.parent.name if folder.name in ("pipeline", "adapter") else folder.name


def data_origins(data: str) -> list[Origin]:
    """Return the data sets of the hub that DATA names: itself, or the sets that a .yaml file mixes."""
    names = [data]
    if Path(data).suffix in (".yaml", ".yml") and Path(data).is_file():
        try:
            content = read_yaml(Path(data))
        except UserError:  # it has been edited since
            content = None
        entries = content.get("sources") if isinstance(content, Mapping) else None
        names = [str(entry.get("data")) for entry in entries or () if isinstance(entry, Mapping)]
    ids = [match[1] for name in names if (match := _DATA.fullmatch(name))]
    return [
        Origin(name=hub_id, place=f"hub:{hub_id}", hub_id=hub_id, license=_license_of_data(hub_id))
        for hub_id in dict.fromkeys(ids)
    ]


def _cached(hub_id: str, file: str, kind: str = "model") -> Path | None:
    """Return a file of a hub repository where the library's cache holds it: then the id is one."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", hub_id):
        return None
    found = try_to_load_from_cache(hub_id, file, repo_type=kind)
    return Path(found) if isinstance(found, str) else None


def _license_of_data(hub_id: str) -> str:
    card = _cached(hub_id, "README.md", "dataset")
    return _license(card.parent) if card else ""


def _license(folder: Path) -> str:
    """Return the licence that the card in a folder states; "" where it states none, or cannot be read."""
    try:
        header: dict[str, Any] = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    named = header.get("license")
    if named == "other":
        named = header.get("license_name")
    return named if isinstance(named, str) else ""
