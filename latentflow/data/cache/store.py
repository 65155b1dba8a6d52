"""Rows of tensors, found by the hashes of their keys, in safetensors files: a file ("shard") is written whole or not at
all, and mapped to be read. Caches and folders of latents are sets of such shards; all caches lie in one folder, which
has a limit."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
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
from torch import Tensor
from torch.nn.functional import pad

from ...errors import UserError
from ...utils.files import save_tensors
from ...utils.progress import progress_bar

if sys.platform != "win32":
    import fcntl

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
            save_tensors(tensors, partial, metadata={"crc32": str(_checksum([keys, self.sums]))})
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
    refuse_inside(data_root)
    folder, root = _folder_of(kind, settings)
    shards = ShardSet(folder, kind, cache=root)
    _describe(folder, kind, settings)
    return shards


def open_folder(kind: str, settings: dict[str, object]) -> tuple[Path, Path, int | None]:
    """Return a folder in the cache for these settings, the cache, and the descriptor that keeps it from being evicted
    until it is closed; of files that are no shards.

    Raises:
        OSError: it cannot be made.
    """
    folder, root = _folder_of(kind, settings)
    folder.mkdir(parents=True, exist_ok=True)
    lock = mark_in_use(folder)
    _describe(folder, kind, settings)
    return folder, root, lock


def _folder_of(kind: str, settings: dict[str, object]) -> tuple[Path, Path]:
    root = cache_root()
    key = hashlib.sha256(json.dumps([_VERSION, kind, settings], sort_keys=True).encode()).hexdigest()[:40]
    return root / kind / key, root


def _describe(folder: Path, kind: str, settings: dict[str, object]) -> None:
    """Write what a folder of the cache holds, for people."""
    about = folder / "settings.json"
    with suppress(OSError):
        if not about.exists():
            about.write_text(json.dumps({"kind": kind, **settings}, indent=2))


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
        with suppress(OSError):
            for path in () if read_only else folder.glob("*.tmp"):  # of processes that were killed
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()
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
        with progress_bar(total=len(keys), initial=done, desc=progress, hidden=hidden) as bar:
            for wait in (False, True):  # first what no other process is at; then what others did not finish
                chunks = [chunk for chunk in chunks if not self._make(keys, chunk, build, bar, wait=wait)]

    def _make(self, keys: Array, chunk: Array, build: Build, bar: Any, *, wait: bool) -> bool:
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


def _joined(batches: Iterator[Tables], bar: Any) -> Tables:
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


# ---------------------------------------------------------------- the folder of all caches, its limit, and locks

LOOKS = "looks-{}.sqlite"  # what images are, of each version; counts and goes like a set
LOCK = "in-use"  # held by whoever has the set open; its time is that of the last use
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_DOOMED = ".deleted-"
# Sets are named by a hash, those of earlier versions were single files. LATENTFLOW_CACHE may be any folder: nothing
# else in it is ours to delete.
_SET = re.compile(rf"[0-9a-f]{{40}}({re.escape(_DOOMED)}\d+|\.safetensors)?")
_reported: set[int] = set()  # limits that are known to be too low


def acquire(path: Path, *, shared: bool = False, wait: bool = True) -> int | None:
    """Return a file descriptor that holds the lock ``path`` until it is closed; None: it is taken, and ``wait`` is off.

    The file is made where it is missing. A process that is killed gives its locks back.

    Raises:
        OSError: there is no such file and it cannot be made.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            if not path.exists():
                raise
            descriptor = os.open(path, os.O_RDONLY)  # in a folder that may only be read
        if sys.platform == "win32":  # an open file cannot be deleted there, which is what most locks are for
            return descriptor
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(descriptor, mode if wait else mode | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # a file system without locks: processes do the same work twice, and nothing worse
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # whoever had it deleted the file: the lock is another one now


def mark_in_use(folder: Path) -> int | None:
    """Make a set's folder and keep it from being evicted until the descriptor is closed; None: it cannot be written."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = acquire(folder / LOCK, shared=True)
        except FileNotFoundError:  # evicted in between
            continue
        except OSError:  # what is there can still be read, and nobody deletes it
            return None
        with suppress(OSError):
            os.utime(folder / LOCK)
        return descriptor


def cache_root() -> Path:
    """Return where caches are kept: the environment's LATENTFLOW_CACHE, else ~/.cache/latentflow."""
    return Path(os.environ.get("LATENTFLOW_CACHE") or Path.home() / ".cache" / "latentflow").expanduser()


def cache_limit() -> int | None:
    """Return the environment's LATENTFLOW_CACHE_LIMIT (such as 20GB or 500M) in bytes; None without one.

    Raises:
        UserError: it is no size.
    """
    given = os.environ.get("LATENTFLOW_CACHE_LIMIT", "").strip()
    if not given:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", given, re.IGNORECASE)
    if match is None:
        raise UserError(
            f"LATENTFLOW_CACHE_LIMIT is '{given}', which is no size", "Write it as 20GB or 500MB."
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def make_room(root: Path, needed: int) -> None:
    """Delete the sets of the cache that were not used for longest, until ``needed`` bytes fit below the limit.

    What a process uses is never deleted; if all is in use, the cache outgrows its limit, and a warning says so once.
    """
    limit = cache_limit()
    if limit is None:
        return
    sets = _sets(root)
    excess = sum(size for _, size, _ in sets) + needed - limit
    for used, size, path in sets:
        if excess <= 0:
            return
        if _delete(path):
            days = (time.time() - used) / 86400
            log.info(
                "cache: deleted %s (%.2f GB, last used %.1f days ago): LATENTFLOW_CACHE_LIMIT is %.2f GB",
                path, size / 1e9, days, limit / 1e9,
            )  # fmt: skip
            excess -= size
    if excess > 0 and limit not in _reported:
        _reported.add(limit)
        log.warning(
            "the cache in %s grows %.2f GB above LATENTFLOW_CACHE_LIMIT (%.2f GB): all that it holds is in use",
            root, excess / 1e9, limit / 1e9,
        )  # fmt: skip


def _sets(root: Path) -> list[tuple[float, int, Path]]:
    """Return time of last use, bytes and path of all that is ours in the cache, what was not used for longest first."""
    found = []
    ours = [path for path in root.glob("*/*") if _SET.fullmatch(path.name)]
    for path in [*root.glob(LOOKS.format("*")), *ours]:
        with suppress(FileNotFoundError):  # another process is at it, or it is no set of ours
            if _DOOMED in path.name:  # by a process that was killed over it
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir():
                size = sum(file.stat().st_size for file in path.iterdir())
                found.append(((path / LOCK).stat().st_mtime, size, path))
            else:
                found.append((path.stat().st_mtime, path.stat().st_size, path))
    return sorted(found)


def _delete(path: Path) -> bool:
    """Delete a set or file; False where it is in use, or may not be deleted."""
    try:
        if path.is_file():
            path.unlink()
            return True
        descriptor = acquire(path / LOCK, wait=False)
        if descriptor is None:
            return False
        try:
            doomed = path.with_name(f"{path.name}{_DOOMED}{os.getpid()}")
            path.rename(doomed)  # at once, so that nobody finds half a set
            shutil.rmtree(doomed)
        finally:
            os.close(descriptor)
    except OSError as error:
        log.debug("%s stays: %s", path, error)
        return False
    return True
