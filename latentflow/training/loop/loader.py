"""Batches: loading them, also in other processes, and splitting them."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.profiler import record_function
from torch.utils.data import DataLoader

from ...errors import RunError, UserError
from ...utils.memory import is_out_of_memory
from .data_order import SampleUse

Batch = dict[str, Any]


class TrainingData(Protocol):
    """A data set as the loop needs it.

    A data set whose samples fit into a forward pass by groups only, such as one for each size, has ``groups`` (N,)
    int64. One with a second data set mixed in has ``mixin_count``, the size of that (its samples come last), and
    ``mixin_share``, its share of every step.
    """

    def __len__(self) -> int: ...

    def __getitems__(self, uses: list[SampleUse]) -> Batch:
        """Return a batch: tensors with B rows; the loop adds ``sample_ids``, the ids of the uses."""

    def name(self, index: int) -> str:
        """Return the name of a sample in messages, such as its file's."""


def groups_of(data: TrainingData) -> Tensor | None:
    """Return the groups (N,) int64 of the samples that fit into one forward pass; None: all do."""
    groups: Tensor | None = getattr(data, "groups", None)
    return groups


class DataFailed(RunError):  # noqa: N818
    """A batch could not be loaded: a file cannot be read, or a process that loads data has died."""


def load_batches(
    data: TrainingData, uses: Iterator[list[SampleUse]], *, num_workers: int, pin_memory: bool
) -> Iterator[list[Batch]]:
    """Load the batches of ``uses`` in order, on the CPU, with ``index`` and ``sample_ids`` (lists of B) added.

    A batch of samples that do not fit into one forward pass comes in parts of one group each (see `groups_of`).

    Raises:
        DataFailed: a batch could not be loaded; the samples, or the process, are named.
    """
    identified: Any = _Identified(data)
    sampler: Any = uses  # an iterator of lists is all that the loader needs
    collate: Any = _identity
    loader: DataLoader[list[Batch]] = DataLoader(
        identified,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator(),  # its own seed must not be drawn from the run's random state
        pin_memory=pin_memory,
        worker_init_fn=_begin_worker,
    )
    previous = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if num_workers:
        # torch's handler raises wherever the loop is when a worker dies, even half-way through an update. Without it
        # the loader finds out when it is next asked for a batch.
        with suppress(ValueError):  # not the main thread: torch has set none
            signal.signal(signal.SIGCHLD, previous or signal.SIG_DFL)
    return _checked(batches)


def _begin_worker(worker: int) -> None:
    """Ignore what a terminal sends to all processes of a run (Ctrl-C, its end): the one that started this one stops.

    SIGTERM stays: it is how a process that hangs is ended.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _checked(batches: Iterator[Any]) -> Iterator[list[Batch]]:
    while True:
        try:
            with record_function("load"):
                batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # torch names a dead worker; what it had sent and is fetched from it only now fails in other ways.
            dead = _dead(getattr(batches, "_workers", ()))
            if not dead and "DataLoader worker" not in str(error):
                raise
            names = ", ".join(f"process {worker.pid}, exit status {worker.exitcode}" for worker in dead)
            raise DataFailed(
                f"a process that loads data has died ({names or error})",
                "If the machine ran out of memory (dmesg tells), lower --num-workers; 0 loads in the main process.",
            ) from error
        if isinstance(batch, _Failure):
            raise DataFailed(batch.what, batch.fix)
        yield batch


def _dead(workers: Sequence[BaseProcess]) -> list[BaseProcess]:
    """Return the workers that have died or are about to: a connection breaks before its process is gone."""
    dying = set(wait([worker.sentinel for worker in workers], timeout=20))
    for worker in workers:
        if worker.sentinel in dying:
            worker.join(timeout=20)
    return [worker for worker in workers if not worker.is_alive()]


class _Failure:
    """An error of the process that loads a batch, in words."""

    def __init__(self, what: str, fix: str) -> None:
        self.what, self.fix = what, fix


class _Identified:
    """The data set with the ids of its rows added to every batch."""

    def __init__(self, data: TrainingData) -> None:
        self._data, self._groups = data, groups_of(data)

    def __len__(self) -> int:
        return len(self._data)

    def __getitems__(self, uses: list[SampleUse]) -> list[Batch] | _Failure:
        try:
            return [load_batch(self._data, part) for part in by_group(uses, self._groups)]
        except (UserError, OSError, SafetensorError, MemoryError) as error:
            return self._failure(error, uses)

    def _failure(self, error: Exception, uses: list[SampleUse]) -> _Failure:
        if isinstance(error, UserError):
            return _Failure(error.what, error.fix)
        names = ", ".join(self._data.name(use.index) for use in uses[:3])
        more = f" and {len(uses) - 3} more" if len(uses) > 3 else ""
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        fix = (
            "Lower --num-workers."
            if is_out_of_memory(error)
            else "Is the disk that holds it still there and whole?"
        )
        return _Failure(f"a batch could not be read ({names}{more}): {reason}", fix)


def by_group(uses: list[SampleUse], groups: Tensor | None) -> list[list[SampleUse]]:
    """Return the uses of each group, in their order; see `groups_of`."""
    if groups is None:
        return [uses]
    parts: dict[int, list[SampleUse]] = {}
    for use in uses:
        parts.setdefault(int(groups[use.index]), []).append(use)
    return list(parts.values())


def load_batch(data: TrainingData, uses: list[SampleUse]) -> Batch:
    """Return the batch of these uses with their ``index`` and ``sample_ids``, lists of B."""
    ids = {"index": [use.index for use in uses], "sample_ids": [use.sample_id for use in uses]}
    return data.__getitems__(uses) | ids


def first_batch(data: TrainingData, rows: int) -> Batch:
    """Return a batch of the first ``rows`` rows, or of as many as are of the first one's group."""
    uses = [SampleUse(row, row) for row in range(min(len(data), rows))]
    return load_batch(data, by_group(uses, groups_of(data))[0])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on ``device``."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def split_rows(batch: Batch, rows: int) -> list[Batch]:
    """Split the batch into parts of up to ``rows`` rows, in order; one that is no larger stays as it is.

    Tensors and lists with one entry a row are cut, everything else goes with every part.
    """
    size = len(batch["sample_ids"])
    if rows >= size:
        return [batch]

    def part(value: Any, start: int) -> Any:
        cut = isinstance(value, Tensor | list) and getattr(value, "ndim", 1) > 0 and len(value) == size
        return value[start : start + rows] if cut else value

    return [{key: part(value, start) for key, value in batch.items()} for start in range(0, size, rows)]


def _identity(batch: Any) -> Any:
    return batch
