"""Tables of tensors in a cache folder, keyed by everything that their values depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentflow.errors import UserError

log = logging.getLogger(__name__)

_VERSION = 1  # raise it when the meaning of a table changes
Tables = dict[str, Tensor]


def cache_root() -> Path:
    """Where tables are kept: the environment's LATENTFLOW_CACHE, else ~/.cache/latentflow."""
    return Path(os.environ.get("LATENTFLOW_CACHE") or Path.home() / ".cache" / "latentflow").expanduser()


def load_or_build(
    kind: str,
    keys: list[str],
    description: dict[str, object],
    build: Callable[[], Tables],
    data_root: Path | None = None,
) -> Tables:
    """The tables stored for these keys and description; built and stored when there are none or they are bad.

    A cache that cannot be written is reported and done without.
    """
    root = cache_root()
    if data_root is not None and root.resolve().is_relative_to(data_root.resolve()):
        raise UserError(
            f"the cache {root} lies inside the data {data_root}",
            "Caches never go into the data: set LATENTFLOW_CACHE to another folder.",
        )
    content = json.dumps([_VERSION, kind, description, keys], sort_keys=True)
    path = root / kind / f"{hashlib.sha256(content.encode()).hexdigest()[:40]}.safetensors"
    if path.exists():
        try:
            return _load(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            log.warning("the cached %s in %s are damaged (%s): making them again", kind, path, error)
    tables = build()
    try:
        _save(path, tables)
    except OSError as error:
        log.warning("the %s could not be cached in %s (%s): going on without", kind, path.parent, error)
    return tables


def _load(path: Path) -> Tables:
    with safe_open(path, framework="pt") as file:
        tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        sums = json.loads((file.metadata() or {})["crc32"])
    for name, table in tables.items():
        if _checksum(table) != sums[name]:
            raise ValueError(f"wrong checksum of '{name}'")
    return tables


def _save(path: Path, tables: Tables) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sums = json.dumps({name: _checksum(table) for name, table in tables.items()})
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        save_file(tables, temporary, metadata={"crc32": sums})
        Path(temporary).replace(path)  # a reader sees the whole file or none
    finally:
        Path(temporary).unlink(missing_ok=True)


def _checksum(table: Tensor) -> int:
    return zlib.crc32(table.contiguous().reshape(-1).view(torch.uint8).numpy().data)
