"""Rows of tensors, found by the hashes of their keys, in safetensors files: a file ("shard") is written whole or not at
all, and mapped to be read. Caches and folders of latents are sets of such shards."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import get_worker_info
from tqdm.auto import tqdm

from ...errors import UserError
from .eviction import acquire, cache_root, make_room, mark_in_use

Array: TypeAlias = np.ndarray[Any, Any]
Tables = dict[str, Tensor]  # name -> (rows, ...)
Build = Callable[[Array], Iterator[Tables]]

log = logging.getLogger(__name__)

_VERSION = 2  # raise it when the meaning of a table changes
_ROWS, _BYTES = 4096, 128 * 2**20  # at most, of a shard
_STALE_SECONDS = 3600.0
_SUFFIX = ".safetensors"
_KEYS, _SUMS = "keys", "crc32"  # kept beside the tables: (rows, 16) uint8 and (rows,) int64
_DIGEST_BYTES = 16
NO_KEY = b""  # the digest of None, which no row has


class DamagedShardError(Exception):
    """A shard does not hold what was written; the message says which and why."""


def digests(keys: Iterable[str | None]) -> Array:
    """Return the hashes of keys, (N,) of 16 bytes: an array, where strings would be N objects. None gives `NO_KEY`."""
    return np.fromiter(
        (
            NO_KEY if key is None else hashlib.blake2b(key.encode(), digest_size=_DIGEST_BYTES).digest()
            for key in keys
        ),
        dtype=f"S{_DIGEST_BYTES}",
    )


class Shard:
    """Some rows, mapped from a file: memory holds only what was read, and the system may drop that again.

    Attributes:
        keys: (rows,) digests.
        tables: name -> array (rows, ...), by name.
        sums: (rows,) int64, the CRC-32 of a row of all tables.
        path: its file; None where it is in memory.
    """

    def __init__(
        self, keys: Array, tables: Mapping[str, Array], sums: Array | None = None, path: Path | None = None
    ) -> None:
        self.keys, self.path = keys, path
        self.tables = {name: tables[name] for name in sorted(tables)}
        self.sums = np.array([self._sum(row) for row in range(len(keys))], np.int64) if sums is None else sums
        self._checked = np.zeros(len(keys), dtype=bool)

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Map a file.

        Raises:
            DamagedShardError: it is torn, or its keys or checksums are not those that were written.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tables = {name: file.get_tensor(name).numpy() for name in list(file.keys())}
                checksum = (file.metadata() or {})["crc32"]
            keys, sums = tables.pop(_KEYS), tables.pop(_SUMS)
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise DamagedShardError(f"{path}: {error}") from error
        if checksum != str(_checksum([keys, sums])):
            raise DamagedShardError(f"{path}: wrong checksum of its keys")
        return cls(keys.reshape(-1).view(f"S{_DIGEST_BYTES}"), tables, sums, path)

    def write(self, folder: Path) -> Path:
        """Write it to its own file in ``folder``. The file is there whole or not at all, whenever the process dies.

        Raises:
            OSError: it cannot be written.
        """
        path = folder / shard_name(self.keys)
        keys = np.frombuffer(self.keys.tobytes(), np.uint8).reshape(-1, _DIGEST_BYTES).copy()
        arrays = {**self.tables, _KEYS: keys, _SUMS: self.sums}
        partial = folder / f"{path.stem}-{os.getpid()}.tmp"
        try:
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            save_file(tensors, partial, metadata={"crc32": str(_checksum([keys, self.sums]))})
            partial.replace(path)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error
        finally:
            partial.unlink(missing_ok=True)
        return path

    def row(self, name: str, row: int) -> Array:
        """Return a row of a table. Before any of its tables is read, the row is compared to its checksum.

        Raises:
            DamagedShardError: it is not what was written.
        """
        if not self._checked[row]:
            if self._sum(row) != self.sums[row]:
                raise DamagedShardError(f"{self.path}: wrong checksum of row {row}")
            self._checked[row] = True
        values: Array = self.tables[name][row]
        return values

    def verify(self) -> None:
        """Compare every row to its checksum; raises DamagedShardError."""
        for row in range(len(self.keys)):
            self.row(next(iter(self.tables)), row)

    def _sum(self, row: int) -> int:
        return _checksum(table[row] for table in self.tables.values())


def shard_name(keys: Array) -> str:
    """Return the name of the file of the shard of these keys."""
    return hashlib.blake2b(keys.tobytes(), digest_size=_DIGEST_BYTES).hexdigest() + _SUFFIX


def _checksum(parts: Iterable[Array]) -> int:
    total = 0
    for part in parts:
        total = zlib.crc32(np.ascontiguousarray(part).data, total)
    return total


def open_cache(kind: str, settings: dict[str, object], data_root: Path | None = None) -> ShardSet:
    """Return the set of shards in the cache for these settings. It is not evicted while it is referred to.

    Args:
        settings: everything but the sample that rows depend on.

    Raises:
        UserError: the cache would lie inside the data.
    """
    root = cache_root()
    refuse_inside(data_root)
    key = hashlib.sha256(json.dumps([_VERSION, kind, settings], sort_keys=True).encode()).hexdigest()[:40]
    shards = ShardSet(root / kind / key, kind, cache=root)
    about = shards.folder / "settings.json"  # for people
    with suppress(OSError):
        if not about.exists():
            about.write_text(json.dumps({"kind": kind, **settings}, indent=2))
    return shards


def refuse_inside(data_root: Path | None) -> None:
    """Raise UserError where the cache lies inside the data."""
    root = cache_root()
    if data_root is not None and root.resolve().is_relative_to(data_root.resolve()):
        raise UserError(
            f"the cache {root} lies inside the data {data_root}",
            "Caches never go into the data: set LATENTFLOW_CACHE to another folder.",
        )


class ShardSet:
    """The shards of one folder.

    Args:
        folder: made where it is missing, unless the set is read only.
        kind: what the rows are, for messages.
        cache: the cache that it belongs to. Then it may be evicted when nobody uses it, its size is bounded with the
            rest, and what cannot be written is kept in memory instead; a folder of the user's raises OSError.
        read_only: what is missing or damaged is not made again.
    """

    def __init__(
        self, folder: Path, kind: str, *, cache: Path | None = None, read_only: bool = False
    ) -> None:
        self.folder, self.kind, self.read_only, self._cache = folder, kind, read_only, cache
        self._shards: list[Shard | None] = []  # None: damaged
        self._names: set[str] = set()
        self._in_memory = False
        if cache is not None:
            if (lock := mark_in_use(folder)) is not None:
                weakref.finalize(self, os.close, lock)
        elif not read_only:
            folder.mkdir(exist_ok=True)
        if not read_only:
            _remove_stale(folder)
        self._open_new()

    def find(self, keys: Array) -> Array:
        """Return shard and row of every digest in ``keys`` (N,) as (N, 2) int32; -1 where there is none."""
        unique, inverse = np.unique(keys, return_inverse=True)
        places = np.full((len(unique), 2), -1, dtype=np.int32)
        for number, shard in enumerate(self._shards):
            if shard is not None and len(unique):
                at = np.minimum(np.searchsorted(unique, shard.keys), len(unique) - 1)
                rows = np.flatnonzero(unique[at] == shard.keys)
                places[at[rows], 0], places[at[rows], 1] = number, rows
        return places[inverse]

    def shard(self, number: int) -> Shard:
        """Return a shard that `find` named."""
        shard = self._shards[number]
        assert shard is not None, "found before it was discarded"
        return shard

    def discard(self, number: int, reason: object) -> None:
        """Drop a damaged shard, so that its rows are made again."""
        path = self.shard(number).path
        self._shards[number] = None
        if path is not None:
            self._delete(path, reason)

    def verify(self) -> None:
        """Read every row, and discard the shards that are damaged."""
        for number, shard in enumerate(self._shards):
            try:
                if shard is not None:
                    shard.verify()
            except DamagedShardError as error:
                self.discard(number, error)

    def fill(self, keys: Array, build: Build, row_bytes: int, progress: str | None = None) -> None:
        """Make the rows of ``keys`` (all different) that are missing, a shard at a time.

        Processes that fill the same set at once share the work. Which rows are made together depends on what was
        missing at the start, and after a kill on the same: what is then left falls into the same shards.

        Args:
            build: yields the tables of batches that follow each other, for positions in ``keys``.
            row_bytes: about how large a row is.
            progress: what to call it in a progress bar; None for no bar.

        Raises:
            UserError: rows are missing, and the set is read only.
            OSError: the folder is not a cache's and cannot be written.
        """
        missing = np.flatnonzero(self.find(keys)[:, 0] < 0)
        if self.read_only and len(missing):
            raise UserError(
                f"{len(missing)} of {len(keys)} {self.kind} are missing in {self.folder}, or damaged",
                "Start the `latentflow precompute` line that made them again: it makes only these.",
            )
        # A power of two, so that batches of usual sizes end where shards do.
        size = int(min(_ROWS, 2 ** int(np.log2(max(64, _BYTES // max(1, row_bytes))))))
        chunks = [missing[start : start + size] for start in range(0, len(missing), size)]
        hidden, done = progress is None or not chunks, len(keys) - len(missing)
        with tqdm(total=len(keys), initial=done, desc=progress, disable=hidden) as bar:
            for wait in (False, True):  # first what no other process is at; then what others did not finish
                chunks = [chunk for chunk in chunks if not self._make(keys, chunk, build, bar, wait=wait)]

    def _make(self, keys: Array, chunk: Array, build: Build, bar: tqdm[None], *, wait: bool) -> bool:
        """Make one shard; return False where another process is making it, and ``wait`` is off."""
        name, claim = shard_name(keys[chunk]), None
        with self._in_memory_instead():
            claim = acquire(self.folder / f"{name}.claim", wait=wait)
            if claim is None:
                return False
            self._open_new()
        try:
            if name in self._names:
                bar.update(len(chunk))
                return True
            shard = Shard(
                keys[chunk], {name: table.numpy() for name, table in _joined(build(chunk), bar).items()}
            )
            with self._in_memory_instead():
                if self._cache is not None:
                    make_room(self._cache, sum(table.nbytes for table in shard.tables.values()))
                shard = Shard.open(shard.write(self.folder))
                self._names.add(name)
            self._shards.append(shard)
            return True
        finally:
            if claim is not None:
                with suppress(OSError):  # on Windows no open file can be deleted: it stays, and is empty
                    (self.folder / f"{name}.claim").unlink()
                os.close(claim)

    @contextmanager
    def _in_memory_instead(self) -> Iterator[None]:
        """Keep on in memory, with one warning, where a cache cannot be written; raise OSError where it is no cache."""
        try:
            yield
        except OSError as error:
            if self._cache is None:
                raise
            if not self._in_memory:
                log.warning(
                    "the %s could not be cached in %s (%s): going on without", self.kind, self.folder, error
                )
            self._in_memory = True

    def _open_new(self) -> None:
        """Open the shards that have come into the folder."""
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            if path.name in self._names:
                continue
            try:
                self._shards.append(Shard.open(path))
            except DamagedShardError as error:
                if path.exists():  # else another process has seen it first
                    self._delete(path, error)
            else:
                self._names.add(path.name)

    def _delete(self, path: Path, reason: object) -> None:
        if self.read_only:
            log.warning("a part of the %s is damaged (%s)", self.kind, reason)
            return
        log.warning("a part of the cached %s is damaged (%s): making it again", self.kind, reason)
        self._names.discard(path.name)
        with suppress(OSError):
            path.unlink()


def _remove_stale(folder: Path) -> None:
    """Remove the temporary files of processes that were killed."""
    with suppress(OSError):
        for path in folder.glob("*.tmp"):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()


def _joined(batches: Iterator[Tables], bar: tqdm[None]) -> Tables:
    """Join batches; rows that are shorter than others in the second dimension are filled with zeros."""
    parts = []
    for batch in batches:
        parts.append(batch)
        bar.update(len(next(iter(batch.values()))))
    return {name: torch.cat(_padded([part[name] for part in parts])) for name in parts[0]}


def _padded(parts: list[Tensor]) -> list[Tensor]:
    if parts[0].ndim == 1:
        return parts
    width = max(part.shape[1] for part in parts)
    return [pad(part, (0, 0) * (part.ndim - 2) + (0, width - part.shape[1])) for part in parts]


class RowIndex:
    """The places of the rows of N samples: eight bytes for each, whatever the size of a row.

    Args:
        shards: the set that holds them.
        find: gives the places (N, 2) int32 of the samples (shard and row; -1: all zeros), after it made what is
            missing. Called again where a shard turns out to be damaged.
    """

    def __init__(self, shards: ShardSet, find: Callable[[], Array]) -> None:
        self._shards, self._find = shards, find
        self._places = find()

    def __len__(self) -> int:
        return len(self._places)

    def table(self, name: str) -> LazyTable | None:
        """Return one of the tables; None where no sample has a row, or rows have none of this name."""
        numbers = self._places[self._places[:, 0] >= 0, 0]
        like = self._shards.shard(numbers[0]).tables.get(name) if len(numbers) else None
        return None if like is None else LazyTable(self, name, like)

    def column(self, name: str) -> Tensor:
        """Return a table with one number for each sample, (N,), in memory; 0 where there is no row."""
        table = self.table(name)
        out = torch.zeros(len(self), dtype=None if table is None else table.dtype)
        for number in np.unique(self._places[:, 0]):
            if number >= 0:
                here = np.flatnonzero(self._places[:, 0] == number)
                out[here] = torch.tensor(self._shards.shard(number).tables[name][self._places[here, 1]])
        return out

    def row(self, name: str, index: int) -> Array | None:
        """Return a sample's row of a table, mapped: not to be written to. None: all zeros.

        Raises:
            UserError: it is damaged and cannot be made again here.
        """
        number, row = self._places[index].tolist()
        if number < 0:
            return None
        try:
            return self._shards.shard(number).row(name, row)
        except DamagedShardError as error:
            what = f"the {self._shards.kind} are damaged: {error}"
            if self._shards.read_only:
                fix = "Start the `latentflow precompute` line that made them again: it makes only the damaged part."
                raise UserError(what, fix) from error
            if get_worker_info() is not None:  # a loader's process: the network is not its to use
                raise UserError(what, "Start the same command again with --num-workers 0.") from error
            self._shards.discard(number, error)
        self._places = self._find()
        return self.row(name, index)


class LazyTable:
    """A table (N, ...) whose rows are read when they are indexed, as a tensor's are: ``table[3]``, ``table[[2, 0]]``.

    What comes back is a tensor in memory; ``table[:]`` is all of it.
    """

    def __init__(self, index: RowIndex, name: str, like: Array) -> None:
        self._index, self._name, self._type = index, name, like.dtype
        self.shape = torch.Size((len(index), *like.shape[1:]))
        self.dtype = torch.from_numpy(np.empty(0, like.dtype)).dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Tensor:
        """Return ``tensor[index]``: the first part of a tuple picks rows, the rest what is wanted of each."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, int):
            return self._pick([range(len(self))[first]])[0][tuple(rest)]
        rows: Sequence[int]
        if isinstance(first, slice):
            rows = range(len(self))[first]
        else:
            chosen = torch.as_tensor(first)
            rows = (chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen).tolist()
        if rest and isinstance(rest[0], list):  # an entry of each row: the others are not read
            return self._pick(rows, rest[0])[(slice(None), *rest[1:])]
        return self._pick(rows)[(slice(None), *rest)]

    def _pick(self, rows: Sequence[int], entries: list[int] | None = None) -> Tensor:
        out = np.empty((len(rows), *self.shape[1 if entries is None else 2 :]), dtype=self._type)
        for place, index in enumerate(rows):
            row = self._index.row(self._name, index)
            if row is None:
                out[place] = 0
            else:
                out[place] = row if entries is None else row[entries[place]]
        return torch.from_numpy(out)
