"""Rows of tensors in safetensors files: one shard is written whole or not at all, and mapped to be read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ...errors import UserError
from .eviction import LOCK, acquire, cache_root, make_room

Array: TypeAlias = np.ndarray[Any, Any]
Tables = dict[str, Tensor]  # name -> (rows, ...)

SUFFIX = ".safetensors"
_KEYS, _SUMS = "keys", "crc32"  # kept beside the tables: (rows, 16) uint8 and (rows,) int64
_DIGEST_BYTES = 16


class DamagedShardError(Exception):
    """A shard does not hold what was written; the message says which and why."""


def digests(keys: Iterable[str]) -> Array:
    """(N,) of 16 bytes each, which stand for the keys: an array, where strings would be N objects."""
    return np.fromiter(
        (hashlib.blake2b(key.encode(), digest_size=_DIGEST_BYTES).digest() for key in keys),
        dtype=f"S{_DIGEST_BYTES}",
    )


class Shard:
    """Some rows, mapped from a file: memory holds only what was read, and the system may drop that again.

    Attributes:
        keys: (rows,) digests, mapped like the tables.
        sums: (rows,) int64, the CRC-32 of a row of all tables, by name.
        tables: name -> array (rows, ...).
    """

    def __init__(
        self, keys: Array, tables: Mapping[str, Array], sums: Array, path: Path | None = None
    ) -> None:
        self.keys, self.sums, self.path = keys, sums, path
        self.tables = {name: tables[name] for name in sorted(tables)}  # the order of their checksum
        self._checked = np.zeros(len(keys), dtype=bool)

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Raises DamagedShardError: it is torn, or its keys or checksums are not those that were written."""
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                tables = {name: file.get_tensor(name).numpy() for name in names}
                told = (file.metadata() or {})["crc32"]
            keys, sums = tables.pop(_KEYS), tables.pop(_SUMS)
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise DamagedShardError(f"{path}: {error}") from error
        if told != str(_checksum([keys, sums])):
            raise DamagedShardError(f"{path}: wrong checksum of its keys")
        return cls(keys.reshape(-1).view(f"S{_DIGEST_BYTES}"), tables, sums, path)

    def row(self, name: str, row: int) -> Array:
        """A row of a table; the first time that any table's row is asked for, all of them are compared to its checksum.

        Raises:
            DamagedShardError: they are not what was written.
        """
        if not self._checked[row]:
            if _checksum(self.parts(row)) != self.sums[row]:
                raise DamagedShardError(f"{self.path}: wrong checksum of row {row}")
            self._checked[row] = True
        values: Array = self.tables[name][row]
        return values

    def parts(self, row: int) -> Iterator[Array]:
        """The row of every table."""
        return (table[row] for table in self.tables.values())

    def verify(self) -> None:
        """Compare every row to its checksum; raises DamagedShardError."""
        for row in range(len(self.keys)):
            self.row(next(iter(self.tables)), row)


def make_shard(keys: Array, tables: Tables) -> Shard:
    """A shard in memory."""
    shard = Shard(
        keys, {name: table.numpy() for name, table in tables.items()}, np.zeros(len(keys), np.int64)
    )
    for row in range(len(keys)):
        shard.sums[row] = _checksum(shard.parts(row))
    return shard


def shard_name(keys: Array) -> str:
    """File name of the shard of these keys."""
    return hashlib.blake2b(keys.tobytes(), digest_size=_DIGEST_BYTES).hexdigest() + SUFFIX


def write_shard(folder: Path, shard: Shard) -> Path:
    """Write a shard to its own file: the whole of it is there or nothing, whenever the process dies.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / shard_name(shard.keys)
    keys = np.frombuffer(shard.keys.tobytes(), np.uint8).reshape(-1, _DIGEST_BYTES).copy()
    beside = {_KEYS: torch.from_numpy(keys), _SUMS: torch.from_numpy(shard.sums)}
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.close(handle)
    try:
        save_file(
            {name: torch.from_numpy(table) for name, table in shard.tables.items()} | beside,
            temporary,
            metadata={"crc32": str(_checksum([keys, shard.sums]))},
        )
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _checksum(parts: Iterable[Array]) -> int:
    total = 0
    for part in parts:
        total = zlib.crc32(np.ascontiguousarray(part).data, total)
    return total


log = logging.getLogger(__name__)

_VERSION = 2  # raise it when the meaning of a table changes
_ROWS, _BYTES = 4096, 128 * 2**20  # at most, of a shard
_STALE_SECONDS = 3600.0
Build = Callable[[Array], Iterator[Tables]]


def rows_per_shard(row_bytes: int) -> int:
    """A power of two, so that batches of usual sizes end where shards do."""
    return int(min(_ROWS, 2 ** int(np.log2(max(64, _BYTES // max(1, row_bytes))))))


def settings_key(kind: str, settings: dict[str, object]) -> str:
    """Hexadecimal hash of everything but the sample that rows depend on."""
    content = json.dumps([_VERSION, kind, settings], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:40]


def open_cache(kind: str, settings: dict[str, object], data_root: Path | None = None) -> ShardSet:
    """The set of shards in the cache for these settings, not to be evicted while it is referred to.

    Raises:
        UserError: the cache would lie inside the data.
    """
    root = cache_root()
    refuse_inside(data_root)
    shards = ShardSet(root / kind / settings_key(kind, settings), kind, cache=root)
    shards.describe(settings)
    return shards


def refuse_inside(data_root: Path | None) -> None:
    """Raises UserError: the cache would lie inside the data."""
    root = cache_root()
    if data_root is not None and root.resolve().is_relative_to(data_root.resolve()):
        raise UserError(
            f"the cache {root} lies inside the data {data_root}",
            "Caches never go into the data: set LATENTFLOW_CACHE to another folder.",
        )


class ShardSet:
    """The shards of one folder, found by the digests of their rows' keys.

    Args:
        folder: made where it is missing.
        kind: what the rows are, for messages.
        cache: the cache that it belongs to. Then it may be evicted when nobody uses it, its size is bounded with the
            rest, and what cannot be written is kept in memory instead; a folder of the user's raises OSError.
        read_only: what is missing or damaged is not made again.
    """

    def __init__(
        self, folder: Path, kind: str, *, cache: Path | None = None, read_only: bool = False
    ) -> None:
        self.folder, self.kind, self.read_only, self._cache = folder, kind, read_only, cache
        self._shards: list[Shard | None] = []
        self._names: set[str] = set()
        self._in_memory = False
        if cache is not None:
            self._hold()
        self._look()

    def describe(self, settings: dict[str, object]) -> None:
        """Leave the settings beside the shards, for people."""
        path = self.folder / "settings.json"
        if not self._in_memory and not path.exists():
            with suppress(OSError):
                path.write_text(json.dumps({"kind": self.kind, **settings}, indent=2))

    def find(self, keys: Array) -> Array:
        """(N, 2) int32, shard and row of every digest in ``keys`` (N,); -1 where there is none."""
        places = np.full((len(keys), 2), -1, dtype=np.int32)
        numbers = [number for number, shard in enumerate(self._shards) if shard is not None]
        if not numbers or not len(keys):
            return places
        held = [shard.keys for shard in self._shards if shard is not None]
        known = np.concatenate(held)
        order = np.argsort(known)
        found = np.searchsorted(known, keys, sorter=order)
        at = order[np.minimum(found, len(known) - 1)]
        hit = known[at] == keys
        ends = np.cumsum([len(one) for one in held])
        which = np.searchsorted(ends, at, side="right")
        places[hit, 0] = np.array(numbers)[which[hit]]
        places[hit, 1] = (at - np.concatenate([[0], ends])[which])[hit]
        return places

    def place(self, key: str) -> tuple[int, int] | None:
        """Shard and row of one key: `find` sorts all that there are."""
        (digest,) = digests([key])
        for number, shard in enumerate(self._shards):
            if shard is not None and len(rows := np.flatnonzero(shard.keys == digest)):
                return number, int(rows[0])
        return None

    def shard(self, number: int) -> Shard:
        shard = self._shards[number]
        assert shard is not None, "found before it was discarded"
        return shard

    def discard(self, number: int, why: object) -> None:
        """Do without a damaged shard; its rows are to be made again."""
        path = self.shard(number).path
        self._shards[number] = None
        if path is not None:
            self._delete(path, why)

    def verify(self) -> None:
        """Read every row, and discard the shards that are damaged."""
        for number, shard in enumerate(self._shards):
            try:
                if shard is not None:
                    shard.verify()
            except DamagedShardError as error:
                self.discard(number, error)

    def _delete(self, path: Path, why: object) -> None:
        if self.read_only:
            log.warning("a part of the %s is damaged (%s)", self.kind, why)
            return
        log.warning("a part of the cached %s is damaged (%s): making it again", self.kind, why)
        self._names.discard(path.name)
        with suppress(OSError):
            path.unlink()

    def fill(self, keys: Array, build: Build, row_bytes: int, progress: str | None = None) -> None:
        """Make the rows of ``keys`` (all different) that are missing, a shard at a time.

        Processes that fill the same set at once share the work. Which rows are made together depends on what was
        missing at the start, and after a kill on the same: what is then left falls into the same shards.

        Args:
            build: yields the tables of batches that follow each other, for positions in ``keys``.
            progress: what to call it in a progress bar; None for no bar.
        """
        missing = np.flatnonzero(self.find(keys)[:, 0] < 0)
        if self.read_only and len(missing):
            raise UserError(
                f"{len(missing)} of {len(keys)} {self.kind} are missing in {self.folder}, or damaged",
                "Start the `latentflow precompute` line that made them again: it makes only these.",
            )
        size = rows_per_shard(row_bytes)
        chunks = [missing[start : start + size] for start in range(0, len(missing), size)]
        done = len(keys) - len(missing)
        with tqdm(
            total=len(keys), initial=done, desc=progress, disable=progress is None or not chunks
        ) as bar:
            # First what no other process is at; then what others did not finish.
            left = [chunk for chunk in chunks if not self._make(keys, chunk, build, bar, wait=False)]
            for chunk in left:
                self._make(keys, chunk, build, bar, wait=True)

    def _make(self, keys: Array, chunk: Array, build: Build, bar: tqdm[None], *, wait: bool) -> bool:
        """False where another process is making this shard, and ``wait`` is off."""
        with self._claim(keys[chunk], wait) as mine:
            if not mine:
                return False
            self._look()
            if shard_name(keys[chunk]) in self._names:
                bar.update(len(chunk))
            else:
                self._add(make_shard(keys[chunk], _collect(build(chunk), len(chunk), bar)))
        return True

    def _add(self, shard: Shard) -> None:
        if not self._in_memory:
            try:
                if self._cache is not None:
                    make_room(self._cache, sum(table.nbytes for table in shard.tables.values()))
                shard = Shard.open(write_shard(self.folder, shard))
            except OSError as error:
                if self._cache is None:
                    raise
                self._keep_in_memory(error)
        if shard.path is not None:
            self._names.add(shard.path.name)
        self._shards.append(shard)

    def _look(self) -> None:
        """Open the shards that have come into the folder."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path.name in self._names:
                continue
            try:
                shard = Shard.open(path)
            except DamagedShardError as error:
                if path.exists():  # else another process has seen it first
                    self._delete(path, error)
                continue
            self._names.add(path.name)
            self._shards.append(shard)

    def _hold(self) -> None:
        """Keep the set from being evicted, and say that it is used."""
        descriptor = None
        while descriptor is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                descriptor = acquire(self.folder / LOCK, shared=True)
            except FileNotFoundError:  # evicted in between
                continue
            except OSError:  # it cannot be written: what is there can still be read, and nobody deletes it
                return
        weakref.finalize(self, os.close, descriptor)
        with suppress(OSError):
            os.utime(self.folder / LOCK)
        sweep(self.folder)

    def _keep_in_memory(self, error: OSError) -> None:
        log.warning("the %s could not be cached in %s (%s): going on without", self.kind, self.folder, error)
        self._in_memory = True

    @contextmanager
    def _claim(self, keys: Array, wait: bool) -> Iterator[bool]:
        """Whether this process is the one to make the shard of ``keys``; given back when the process dies."""
        path = self.folder / f"{shard_name(keys)}.claim"
        if self._in_memory:
            yield True
            return
        try:
            descriptor = acquire(path, wait=wait)
        except OSError as error:
            if self._cache is None:
                raise
            self._keep_in_memory(error)
            yield True
            return
        if descriptor is None:
            yield False
            return
        try:
            yield True
        finally:
            with suppress(OSError):  # on Windows no open file can be deleted: it stays, and is empty
                path.unlink(missing_ok=True)
            os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove the temporary files of processes that were killed."""
    with suppress(OSError):
        for path in folder.glob("*.tmp"):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()


def _collect(batches: Iterator[Tables], rows: int, bar: tqdm[None]) -> Tables:
    """One table of all batches; rows that are shorter than others in the second dimension are filled with zeros."""
    tables: Tables = {}
    start = 0
    for batch in batches:
        end = start + len(next(iter(batch.values())))
        for name, part in batch.items():
            tables[name] = table = _fitting(tables.get(name), part, rows)
            if part.ndim > 1:
                table[start:end, : part.shape[1]] = part
            else:
                table[start:end] = part
        bar.update(end - start)
        start = end
    if start != rows:
        raise ValueError(f"{start} rows were made where {rows} were asked for")
    return tables


def _fitting(table: torch.Tensor | None, part: torch.Tensor, rows: int) -> torch.Tensor:
    """A table of ``rows`` that takes ``part``: the one there is, wider where need be."""
    if table is not None and (part.ndim == 1 or table.shape[1] >= part.shape[1]):
        return table
    wider = torch.zeros(rows, *part.shape[1:], dtype=part.dtype)
    if table is not None:
        wider[:, : table.shape[1]] = table
    return wider
