"""Batches: loading them, also in other processes, splitting them, and what happens when one cannot be had."""

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
from .data_order import Draw
from .signals import leave_to_parent

Batch = dict[str, Any]


class TrainingData(Protocol):
    """What the loop needs of a data set."""

    def __len__(self) -> int: ...

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """A batch for these draws: tensors with B rows; the loop adds ``numbers``, the draws' running numbers."""

    def name(self, index: int) -> str:
        """What to call a sample in a message, such as its file name."""


def groups_of(data: TrainingData) -> Tensor | None:
    """(N,) int64, which samples fit into one forward pass, for data of several sizes; None: all do."""
    groups: Tensor | None = getattr(data, "groups", None)
    return groups


def second_of(data: TrainingData) -> tuple[int, float]:
    """How many samples, the last ones, are a second set that is mixed in, and which share of each step is of it."""
    return getattr(data, "second", 0), getattr(data, "second_share", 0.0)


class DataFailed(RunError):  # noqa: N818 (says what happened)
    """A batch could not be had: a file that cannot be read, or a process that loads data has died."""


def load_batches(
    data: TrainingData, draws: Iterator[list[Draw]], *, num_workers: int, pin_memory: bool
) -> Iterator[list[Batch]]:
    """The batches of ``draws`` in order, on the CPU, with ``index`` and ``numbers`` (lists of B) added.

    A batch of samples that do not fit into one forward pass comes in parts of one group each (see `groups_of`).

    Raises:
        DataFailed: a batch could not be had; the samples, or the process, are named.
    """
    numbered: Any = _Numbered(data)
    sampler: Any = draws  # an iterator of lists of draws is all that the loader needs
    collate: Any = _identity
    loader: DataLoader[list[Batch]] = DataLoader(
        numbered,
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


def _begin_worker(number: int) -> None:
    leave_to_parent()


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
            names = ", ".join(f"process {one.pid}, exit status {one.exitcode}" for one in dead)
            raise DataFailed(
                f"a process that loads data has died ({names or error})",
                "If the machine ran out of memory (dmesg tells), lower --num-workers; 0 loads in the main process.",
            ) from error
        if isinstance(batch, _Failure):
            raise DataFailed(batch.what, batch.fix)
        yield batch


def _dead(workers: Sequence[BaseProcess]) -> list[BaseProcess]:
    """Those that have died or are about to: a connection breaks before its process is gone, and can be waited for."""
    dying = set(wait([one.sentinel for one in workers], timeout=20))
    for one in workers:
        if one.sentinel in dying:
            one.join(timeout=20)
    return [one for one in workers if not one.is_alive()]


class _Failure:
    """What went wrong with a batch in the process that loads it, in words."""

    def __init__(self, what: str, fix: str) -> None:
        self.what, self.fix = what, fix


class _Numbered:
    """The data set with what identifies its rows added to every batch."""

    def __init__(self, data: TrainingData) -> None:
        self._data, self._groups = data, groups_of(data)

    def __len__(self) -> int:
        return len(self._data)

    def __getitems__(self, draws: list[Draw]) -> list[Batch] | _Failure:
        try:
            return [numbered(self._data, part) for part in by_group(draws, self._groups)]
        except (UserError, OSError, SafetensorError, MemoryError) as error:
            return self._failure(error, draws)

    def _failure(self, error: Exception, draws: list[Draw]) -> _Failure:
        if isinstance(error, UserError):
            return _Failure(error.what, error.fix)
        names = ", ".join(self._data.name(draw.index) for draw in draws[:3])
        more = f" and {len(draws) - 3} more" if len(draws) > 3 else ""
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        fix = (
            "Lower --num-workers."
            if is_out_of_memory(error)
            else "Is the disk that holds it still there and whole?"
        )
        return _Failure(f"a batch could not be read ({names}{more}): {reason}", fix)


def by_group(draws: list[Draw], groups: Tensor | None) -> list[list[Draw]]:
    """The draws of each group, in their order; see `groups_of`."""
    if groups is None:
        return [draws]
    parts: dict[int, list[Draw]] = {}
    for draw in draws:
        parts.setdefault(int(groups[draw.index]), []).append(draw)
    return list(parts.values())


def numbered(data: TrainingData, draws: list[Draw]) -> Batch:
    """The batch of these draws, and which they are: ``index`` and ``numbers``, lists of B."""
    numbers = {"index": [draw.index for draw in draws], "numbers": [draw.number for draw in draws]}
    return data.__getitems__(draws) | numbers


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def split_rows(batch: Batch, rows: int) -> list[Batch]:
    """The batch in parts of up to ``rows`` rows, in order; itself if it is no larger.

    Tensors and lists with one entry a row are cut, everything else goes with every part.
    """
    size = len(batch["numbers"])
    if rows >= size:
        return [batch]

    def part(value: Any, start: int) -> Any:
        cut = isinstance(value, Tensor | list) and getattr(value, "ndim", 1) > 0 and len(value) == size
        return value[start : start + rows] if cut else value

    return [{key: part(value, start) for key, value in batch.items()} for start in range(0, size, rows)]


def _identity(batch: Any) -> Any:
    return batch
