"""Rows of tensors in safetensors files: one shard is written whole or not at all, and mapped to be read."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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
