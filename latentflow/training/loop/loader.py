"""Batches: loading them, also in other processes; and passing them through the network, in parts that memory allows."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from torch.profiler import record_function
from torch.utils.data import DataLoader

from ...config import LoopConfig
from ...errors import RunError, UserError, one_line
from ...utils.memory import OutOfMemory, is_out_of_memory, out_of_memory, release_memory
from .checkpoint import State, random_state, restore_random_state
from .data_order import SampleUse
from .distributed import in_any_process, most_of_any_process
from .trained_module import TrainedModule

log = logging.getLogger(__name__)

Batch = dict[str, Any]
Values = dict[str, Tensor]


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
    loader: DataLoader[list[Batch]] = DataLoader(
        identified,
        batch_sampler=sampler,
        collate_fn=_identity,
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


class BatchPrefetcher:
    """The batches of ``batches``, of which the next one can be loaded before it is asked for."""

    def __init__(self, batches: Iterator[list[Batch]]) -> None:
        self._batches = batches
        self._next: list[Batch] | DataFailed | StopIteration | None = None

    def load(self) -> None:
        """Load the next batch now; a failure is raised when it is asked for."""
        if self._next is None:
            try:
                self._next = next(self._batches)
            except (DataFailed, StopIteration) as error:
                self._next = error

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        self.load()
        batch, self._next = self._next, None
        if isinstance(batch, Exception):
            raise batch
        assert batch is not None
        return batch


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
            workers = getattr(batches, "_workers", ())
            if not workers or str(error).startswith(
                "Caught "
            ):  # torch's words for what a worker raised: a defect
                raise
            # torch names a dead worker; what it had sent and is fetched from it only now fails in other ways.
            dead = _dead(workers)
            if not dead and "DataLoader worker" not in str(error):
                raise
            names = ", ".join(f"process {worker.pid}, exit status {worker.exitcode}" for worker in dead)
            raise DataFailed(
                f"a process that loads data has died ({names or error})",
                "If the machine ran out of memory (dmesg tells), lower --num-workers; 0 loads in the main process.",
            ) from error
        if isinstance(batch, DataFailed):
            raise batch
        yield batch


def _dead(workers: Sequence[BaseProcess]) -> list[BaseProcess]:
    """Return the workers that have died or are about to: a connection breaks before its process is gone."""
    dying = set(wait([worker.sentinel for worker in workers], timeout=20))
    for worker in workers:
        if worker.sentinel in dying:
            worker.join(timeout=20)
    return [worker for worker in workers if not worker.is_alive()]


class _Identified:
    """The data set with the ids of its rows added to every batch."""

    def __init__(self, data: TrainingData) -> None:
        self._data, self._groups = data, groups_of(data)

    def __getitems__(self, uses: list[SampleUse]) -> list[Batch] | DataFailed:
        """Return the batches of the uses, or the error in words: what a process raises reaches the loop as text."""
        try:
            return [load_batch(self._data, part) for part in by_group(uses, self._groups)]
        except UserError as error:
            return DataFailed(error.what, error.fix)
        except (OSError, SafetensorError, MemoryError) as error:
            names = ", ".join(self._data.name(use.index) for use in uses[:3])
            more = f" and {len(uses) - 3} more" if len(uses) > 3 else ""
            why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            fix = "Is the disk that holds it still there and whole?"
            if is_out_of_memory(error):
                fix = "Lower --num-workers."
            return DataFailed(f"a batch could not be read ({names}{more}): {why}", fix)


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


def samples_per_epoch(data: TrainingData) -> float:
    """Return the number of samples in which each of the user's images comes once, with those that are mixed in."""
    mixed, share = getattr(data, "mixin_count", 0), getattr(data, "mixin_share", 0.0)
    return float((len(data) - mixed) / (1 - share))


def first_batch(data: TrainingData, rows: int) -> Batch:
    """Return a batch of the first ``rows`` rows, or of as many as are of the first one's group."""
    uses = [SampleUse(row, row) for row in range(min(len(data), rows))]
    return load_batch(data, by_group(uses, groups_of(data))[0])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors, also those in lists, on ``device``."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(each) for each in value]
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    return {key: moved(value) for key, value in batch.items()}


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


class Part(NamedTuple):
    """Rows that pass through the network together.

    Attributes:
        batch: the rows.
        counts: whether they are part of the step; a part that only keeps the other processes company is not.
        last: whether gradients are averaged over the processes after it.
    """

    batch: Batch
    counts: bool
    last: bool


class Recovery:
    """Run the forward and backward passes of a step so that a failure leaves weights and optimisers untouched.

    Args:
        modules: trained in a step.
        data: for the names of samples.
        config: batch, accumulation, and whether batches may be split.
        accelerator: of the run.
        phase: what to call the training when memory runs out; a key of `latentflow.utils.memory.ADVICE`.

    Attributes:
        micro_batch: rows of one forward pass; fewer than a batch after running out of memory.
        random: torch's random state before the step.
        finished: whether the passes of the step succeeded: from then on weights change.
        losses: what names the culprits if the loss of the step is not finite.
    """

    def __init__(
        self,
        modules: Sequence[TrainedModule],
        data: TrainingData,
        config: LoopConfig,
        accelerator: Accelerator,
        phase: str,
    ) -> None:
        self._modules, self._data, self._config = modules, data, config
        self._accelerator, self._phase = accelerator, phase
        self.micro_batch = config.train_batch_size
        self.random: State = {}
        self.finished = False
        self.losses: list[Batch] = []
        # Gradients are averaged over the processes by us, after all of them had memory enough. DistributedDataParallel
        # averages during the last backward pass: a process that cannot finish its own would leave the others waiting.
        self._reduces = config.auto_micro_batch and accelerator.num_processes > 1

    def run(
        self, batches: Iterator[list[Batch]], step: int, passes: Callable[[Iterable[Part]], Values]
    ) -> Values:
        """Load the batches of ``step`` (1-based), and call ``passes`` with their parts until it succeeds.

        Returns:
            What it returned; the modules hold the gradients, averaged over the processes.

        Raises:
            DataFailed, OutOfMemory: the weights and their optimisers are as before the step.
        """
        self.finished, self.random = False, random_state()
        micros = self._load(batches)
        while True:
            failure = None
            self.losses = []
            try:
                values = passes(self._parts(micros))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = out_of_memory(self._phase, error)
            failed = failure is not None
            if not (in_any_process(self._accelerator, failed) if self._reduces else failed):
                break
            self._halve_micro_batch(failure, step)
        if self._reduces:
            self._reduce_gradients()
        self.finished = True
        return values

    def remember(self, batch: Batch, result: Values) -> None:
        """Keep what names the culprits of a non-finite loss."""
        if "per_sample" in result:
            per_sample, t = result["per_sample"], result.get("t")
            self.losses.append({"index": batch["index"], "per_sample": per_sample, "t": t})

    def suspects(self, losses: list[Batch]) -> list[str]:
        """Return the names of the samples of a step whose loss is not finite."""
        found = []
        for part in losses:
            for row in (~torch.isfinite(part["per_sample"])).nonzero().flatten().tolist():
                at = "" if part["t"] is None else f" (t = {float(part['t'][row]):.4f})"
                found.append(one_line(self._data.name(int(part["index"][row])) + at))
        return found

    def _load(self, batches: Iterator[list[Batch]]) -> Iterable[list[Batch]]:
        """Return the batches of a step; several processes have all of theirs before any of them begins."""
        micros: Iterable[list[Batch]] = islice(batches, self._config.gradient_accumulation_steps)
        failure = None
        if self._config.auto_micro_batch or self._accelerator.num_processes > 1:
            try:
                micros = list(micros)  # also to try again with
            except DataFailed as error:
                failure = error
        if in_any_process(self._accelerator, failure is not None):
            raise failure or DataFailed(
                "another process could not load its data", "Its own message says why."
            )
        return micros

    def _parts(self, micros: Iterable[list[Batch]]) -> Iterator[Part]:
        """Yield the parts of a step.

        In a sharded run the processes need one another in every pass, and a batch of images of several sizes may
        have more parts in another one: then a part passes again, and counts for nothing.
        """
        for micro, batches in enumerate(micros, 1):
            parts = [part for batch in batches for part in split_rows(batch, self.micro_batch)]
            passes = len(parts)
            if self._modules[0].sharded:
                passes = most_of_any_process(self._accelerator, passes)
            for number in range(passes):
                last = micro == self._config.gradient_accumulation_steps and number == passes - 1
                counts = number < len(parts)
                yield Part(parts[min(number, len(parts) - 1)], counts, last and not self._reduces)

    def _halve_micro_batch(self, failure: OutOfMemory | None, step: int) -> None:
        """Make ready to repeat the step with forward passes of half the size, or raise ``failure``."""
        for module in self._modules:
            module.trained.zero_grad()
        release_memory()
        reason = failure.what if failure is not None else "out of memory in another process"
        if not self._config.auto_micro_batch or self.micro_batch == 1:
            raise failure or OutOfMemory(reason)
        self.micro_batch = (self.micro_batch + 1) // 2
        restore_random_state(self.random)
        log.warning(
            f"WARNING: step {step}: {reason}\nFrom now on batches of {self._config.train_batch_size} pass in "
            f"parts of {self.micro_batch}; samples and noise stay the same."
        )

    def _reduce_gradients(self) -> None:
        parameters = [parameter for module in self._modules for parameter in module.trained.parameters()]
        held = [parameter.grad is not None for parameter in parameters]
        used = torch.tensor(held, device=self._accelerator.device)
        anywhere = self._accelerator.reduce(used.int(), reduction="sum").tolist()
        for parameter, processes in zip(parameters, anywhere, strict=True):
            if processes:  # the samples of one of them may be all that uses it
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self._accelerator.reduce(grad, reduction="mean")
