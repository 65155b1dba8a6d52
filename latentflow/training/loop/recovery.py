"""One step's batches through the network, again in smaller parts when memory runs out; in all processes alike."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ...config import LoopConfig
from ...errors import one_line
from ...utils.memory import OutOfMemory, is_out_of_memory, out_of_memory, release_memory
from . import checkpoint
from .distributed import in_any_process, most_of_any_process
from .loader import Batch, DataFailed, TrainingData, split_rows
from .trained_module import TrainedModule

log = logging.getLogger(__name__)

Values = dict[str, Tensor]


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
        self.random: checkpoint.State = {}
        self.finished = False
        self._losses: list[Batch] = []
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
        self.finished, self.random = False, checkpoint.random_state()
        micros = self._load(batches)
        while True:
            failure = None
            self._losses.clear()
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
            self._losses.append({"index": batch["index"], "per_sample": per_sample, "t": t})

    def suspects(self) -> list[str]:
        """Return the names of the samples of the last step whose loss is not finite."""
        found = []
        for part in self._losses:
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
            module.forget_gradients()
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

    def _reduce_gradients(self) -> None:
        parameters = [parameter for module in self._modules for parameter in module.trained.parameters()]
        held = [parameter.grad is not None for parameter in parameters]
        used = torch.tensor(held, device=self._accelerator.device)
        anywhere = self._accelerator.reduce(used.int(), reduction="sum").tolist()
        for parameter, processes in zip(parameters, anywhere, strict=True):
            if processes:  # the samples of one of them may be all that uses it
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self._accelerator.reduce(grad, reduction="mean")
