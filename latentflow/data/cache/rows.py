"""Rows of a set of shards in the order of N samples, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ...errors import UserError
from .store import Array, DamagedShardError, ShardSet

_NONE = -1


class Located:
    """Where the rows of N samples lie: eight bytes for each, whatever the size of a row.

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

    def table(self, name: str) -> Rows | None:
        """One of the tables; None where the rows have none of this name."""
        held = self._places[self._places[:, 0] != _NONE]
        if len(held) and name not in self._shards.shard(held[0, 0]).tables:
            return None
        return Rows(self, name)

    def spread(self, rows: list[int], size: int) -> Located:
        """These samples at ``rows`` among ``size``; the others are all zeros."""

        def find() -> Array:
            places = np.full((size, 2), _NONE, dtype=np.int32)
            places[rows] = self._find()
            return places

        return Located(self._shards, find)

    def like(self, name: str) -> Array:
        """A table of one of the shards, for the shape and type of its rows."""
        held = self._places[self._places[:, 0] != _NONE]
        return self._shards.shard(held[0, 0]).tables[name]

    def column(self, name: str) -> Tensor:
        """A table with one number for each sample, (N,), in memory; 0 where there is no row."""
        out = torch.zeros(len(self), dtype=torch.from_numpy(np.empty(0, self.like(name).dtype)).dtype)
        for number in np.unique(self._places[:, 0]):
            if number != _NONE:
                here = np.flatnonzero(self._places[:, 0] == number)
                out[here] = torch.tensor(self._shards.shard(number).tables[name][self._places[here, 1]])
        return out

    def row(self, name: str, index: int) -> Array | None:
        """A sample's row of a table, mapped: not to be written to. None: all zeros.

        Raises:
            UserError: it is damaged and cannot be made again here.
        """
        number, row = self._places[index]
        if number == _NONE:
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


class Rows:
    """A table (N, ...) whose rows are read when they are indexed, as a tensor's are: ``rows[3]``, ``rows[[2, 0]]``.

    What comes back is a tensor in memory; ``rows[:]`` is all of it.
    """

    def __init__(self, located: Located, name: str) -> None:
        self._located, self._name = located, name
        like = located.like(name)
        self.shape = torch.Size((len(located), *like.shape[1:]))
        self.dtype = torch.from_numpy(np.empty(0, like.dtype)).dtype
        self._type = like.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Tensor:
        """As ``tensor[index]``; the first part of a tuple picks rows, the rest what is wanted of each."""
        if isinstance(index, tuple):
            first, rest = index[0], index[1:]
            return self[first][rest] if isinstance(first, int) else self[first][(slice(None), *rest)]
        if isinstance(index, int):
            return self.pick([range(len(self))[index]])[0]
        if isinstance(index, slice):
            return self.pick(range(len(self))[index])
        wanted = torch.as_tensor(index)
        if wanted.dtype == torch.bool:
            wanted = wanted.nonzero().flatten()
        return self.pick(wanted.tolist())

    def pick(self, indices: Any, parts: Any = None) -> Tensor:
        """Rows at ``indices``; with ``parts`` (as many ints) only this entry of each row's first dimension."""
        shape = self.shape[1:] if parts is None else self.shape[2:]
        out = np.empty((len(indices), *shape), dtype=self._type)
        for place, index in enumerate(indices):
            row = self._located.row(self._name, index)
            if row is None:
                out[place] = 0
            else:
                out[place] = row if parts is None else row[parts[place]]
        return torch.from_numpy(out)
