"""The gradients of one step: forward and backward passes, in smaller parts when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.profiler import record_function

from ...config import LoopConfig
from ...errors import one_line
from ...utils.memory import OutOfMemory, is_out_of_memory, out_of_memory, release_memory
from . import checkpoint
from .distributed import in_any_process, most_of_any_process
from .loader import Batch, DataFailed, TrainingData, split_rows, to_device
from .trained_module import Player

log = logging.getLogger(__name__)


class Gradients:
    """Leaves the mean gradients over a step's samples in the players.

    Args:
        players: called with every batch, in this order.
        data: for the names of samples.
        config: batch, accumulation, and whether batches may be split.
        accelerator: of the run.
        phase: what to call this when memory runs out; a key of `latentflow.utils.memory.ADVICE`.

    Attributes:
        micro_batch: rows of one forward pass; fewer than a batch after running out of memory.
        random: torch's random state before the step.
    """

    def __init__(
        self,
        players: Sequence[Player],
        data: TrainingData,
        config: LoopConfig,
        accelerator: Accelerator,
        phase: str,
    ) -> None:
        self._players, self._data, self._config = players, data, config
        self._accelerator, self._phase = accelerator, phase
        self.micro_batch = config.train_batch_size
        self.random: checkpoint.State = {}
        self._losses: list[Batch] = []  # of the last step, by sample

    def compute(self, batches: Iterator[list[Batch]], step: int) -> dict[str, Tensor]:
        """The gradients of step ``step`` (1-based) -> its values to log, on the device: reading them waits for it.

        Raises:
            DataFailed, OutOfMemory: the weights and their optimisers are as before the step.
        """
        self.random = checkpoint.random_state()
        micros = self._load(batches)
        while True:
            failure = None
            try:
                result = self._backward_passes(micros)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = out_of_memory(self._phase, error)
            if not self._failed_anywhere(failure is not None):
                break
            self._take_smaller_parts(failure, step)
        if self._reduces_itself:
            self._reduce_gradients()
        return result

    def _load(self, batches: Iterator[list[Batch]]) -> Iterable[list[Batch]]:
        """The batches of a step; several processes have all of theirs before any of them begins."""
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

    def suspects(self) -> list[str]:
        """The samples of the last step whose loss is not finite."""
        return [one_line(name) for part in self._losses for name in self._nonfinite_samples(part)]

    def _backward_passes(self, micros: Iterable[list[Batch]]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        self._losses.clear()
        samples = self._config.gradient_accumulation_steps * self._config.train_batch_size
        for part, counts, last in self._passes(micros):
            parts_in_step = samples / len(part["numbers"])
            part = to_device(part, self._accelerator.device)
            for player in self._players:
                with ExitStack() as stack:
                    if not last or self._reduces_itself:
                        stack.enter_context(self._accelerator.no_sync(player.prepared))
                    with record_function("forward"):
                        result = player.prepared(part)
                    if not result:
                        continue
                    with record_function("backward"):
                        self._accelerator.backward(result["loss"] / parts_in_step * counts)
                if counts:
                    _accumulate(values, result, parts_in_step)
                    if "per_sample" in result:
                        self._losses.append(
                            {"index": part["index"], "per_sample": result["per_sample"], "t": result.get("t")}
                        )
        return values

    def _passes(self, micros: Iterable[list[Batch]]) -> Iterator[tuple[Batch, bool, bool]]:
        """What passes through the network in a step: rows, whether they count, whether they are the last.

        In a sharded run the processes need one another in every pass, and a batch of images of several sizes may
        have more parts in another one: then a part passes again, and counts for nothing.
        """
        for micro, batches in enumerate(micros, 1):
            parts = [part for batch in batches for part in split_rows(batch, self.micro_batch)]
            passes = len(parts)
            if self._players[0].sharded:
                passes = most_of_any_process(self._accelerator, passes)
            for number in range(passes):
                last = micro == self._config.gradient_accumulation_steps and number == passes - 1
                yield parts[min(number, len(parts) - 1)], number < len(parts), last

    def _nonfinite_samples(self, part: Batch) -> list[str]:
        bad = (~torch.isfinite(part["per_sample"])).nonzero().flatten().tolist()
        times = part["t"]
        return [
            self._data.name(int(part["index"][row]))
            + (f" (t = {float(times[row]):.4f})" if times is not None else "")
            for row in bad
        ]

    def _failed_anywhere(self, here: bool) -> bool:
        return in_any_process(self._accelerator, here) if self._reduces_itself else here

    @property
    def _reduces_itself(self) -> bool:
        """Whether gradients are averaged over the processes by us, after all of them had memory enough.

        DistributedDataParallel averages during the last backward pass: a process that cannot finish its own would
        leave the others waiting.
        """
        return self._config.auto_micro_batch and self._accelerator.num_processes > 1

    def _reduce_gradients(self) -> None:
        parameters = [one for player in self._players for one in player.trained.parameters()]
        used = torch.tensor([one.grad is not None for one in parameters], device=self._accelerator.device)
        anywhere = self._accelerator.reduce(used.int(), reduction="sum").tolist()
        for parameter, processes in zip(parameters, anywhere, strict=True):
            if processes:  # the samples of one of them may be all that uses it
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self._accelerator.reduce(grad, reduction="mean")

    def _take_smaller_parts(self, failure: OutOfMemory | None, step: int) -> None:
        """Make ready to repeat the step with forward passes of half the size, or raise ``failure``."""
        for player in self._players:
            player.forget_gradients()
        release_memory()
        reason = failure.what if failure is not None else "out of memory in another process"
        if not self._config.auto_micro_batch or self.micro_batch == 1:
            raise failure or OutOfMemory(reason)
        self.micro_batch = (self.micro_batch + 1) // 2
        checkpoint.restore_random_state(self.random)
        log.warning(
            f"WARNING: step {step}: {reason}\nFrom now on batches of {self._config.train_batch_size} pass in "
            f"parts of {self.micro_batch}; samples and noise stay the same."
        )


def _accumulate(values: dict[str, Tensor], result: Batch, parts: float) -> None:
    for name, value in result.items():
        if isinstance(value, Tensor) and value.ndim == 0:
            value = value.detach().double() / parts
            values[name] = values[name] + value if name in values else value
