"""Prepared pixels, latents and text embeddings, kept outside the data and keyed by content.

A table is one safetensors file. Its name is a hash of everything that its values depend on: the bytes of the
pictures (not their names or order), the transform, and the weights and config of the network that made it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from latentflow.errors import UserError

from .examples import Example, Source
from .read import parse_colour, read_image, to_pixels

T = TypeVar("T")
R = TypeVar("R")
log = logging.getLogger(__name__)

_VERSION = 1  # raise it when the meaning of a table changes
Tables = dict[str, Tensor]


def cache_root() -> Path:
    """Where tables are kept: the environment's LATENTFLOW_CACHE, else ~/.cache/latentflow."""
    return Path(os.environ.get("LATENTFLOW_CACHE") or Path.home() / ".cache" / "latentflow").expanduser()


def cached_pixels(
    source: Source, resolution: int | tuple[int, int], background: str = "white", progress: bool = True
) -> Tensor:
    """Every picture of ``source``, prepared by ``read_image``: uint8 (N, 3, H, W), in the source's order.

    Raises:
        UserError: a picture cannot be decoded (run the source through ``readable`` first), or the cache
            would lie inside the data.
    """
    unique, rows = _unique(source)

    def build() -> Tables:
        read = map_threaded(lambda e: _pixels(e, resolution, background), unique)
        bar = tqdm(read, total=len(unique), desc="reading pictures", disable=not progress)
        return {"pixels": torch.stack(list(bar))}

    description = _transform(resolution, background)
    pixels = load_or_build("pixels", _keys(unique), description, build, source.root)["pixels"]
    return pixels if _in_order(rows, len(unique)) else pixels[torch.tensor(rows)]


def map_threaded(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``map`` in a few threads, in order (Pillow decodes without the interpreter lock)."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, items)


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


def _pixels(example: Example, resolution: int | tuple[int, int], background: str) -> Tensor:
    try:
        return to_pixels(read_image(example, resolution, background))
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise UserError(
            f"cannot read {example.name}: {error}", "`latentflow check` lists every file that cannot be read."
        ) from error


def _transform(resolution: int | tuple[int, int], background: str) -> dict[str, object]:
    size = [resolution, resolution] if isinstance(resolution, int) else list(resolution)
    return {"size": size, "background": parse_colour(background), "resize": "fit-lanczos"}


def _unique(source: Source) -> tuple[list[Example], list[int]]:
    """One example of each content, ordered by key, and for every example of the source its row there."""
    keys = source.content_keys()
    first = dict(zip(reversed(keys), reversed(source.examples), strict=True))
    order = {key: row for row, key in enumerate(sorted(first))}
    return [first[key] for key in order], [order[key] for key in keys]


def _keys(examples: list[Example]) -> list[str]:
    return [example.content_key() for example in examples]


def _in_order(rows: list[int], total: int) -> bool:
    return rows == list(range(total))
