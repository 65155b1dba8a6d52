"""The order of samples of which only those of one group, such as one size, fit into a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def grouped_permutation(groups: Tensor, first: int, batch: int, generator: torch.Generator) -> Tensor:
    """A random permutation of all samples in which batches are of one group as far as the numbers go.

    Batches lie at multiples of ``batch`` of the running number, whatever the epoch: the batch that the epoch before
    left unfinished is completed first. What does not fill a batch of its group shares one with the neighbouring
    groups' rest; such batches are passed through the network in parts. So nothing is left out or used twice.

    Args:
        groups: (N,) int64, each sample's group.
        first: running number of the permutation's first sample.
        batch: samples of one optimiser step.

    Returns:
        (N,) int64, a permutation of 0 .. N - 1.
    """
    order = torch.randperm(len(groups), generator=generator)
    order = order[torch.argsort(groups[order], stable=True)]
    grouped = groups[order]
    counts = torch.bincount(grouped)
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[grouped]
    full = place < (counts // batch * batch)[grouped]
    batches, rest = order[full].view(-1, batch), order[~full]
    batches = batches[torch.randperm(len(batches), generator=generator)]
    # Which groups share a batch changes with the epoch.
    rest = rest.roll(int(torch.randint(len(rest), (), generator=generator))) if len(rest) else rest
    begun = min(-first % batch, len(order))
    broken = max(0, -(-(begun - len(rest)) // batch))  # batches needed to complete the one before
    rest, batches = torch.cat([rest, batches[:broken].flatten()]), batches[broken:]
    head, rest = rest[:begun], rest[begun:]
    whole = len(rest) // batch * batch
    batches = torch.cat([batches, rest[:whole].view(-1, batch)])
    batches = batches[torch.randperm(len(batches), generator=generator)]
    return torch.cat([head, batches.flatten(), rest[whole:]])


@dataclass(frozen=True, slots=True)
class Draw:
    """One use of one sample: its index in the data set and the running number of this use over the whole run."""

    index: int
    number: int


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """Every epoch is a fresh permutation; batches run on across epoch ends, so no sample is dropped or repeated.

    Of two sets that are mixed each has epochs of its own, and every step has the same number of samples of each.

    Args:
        size: samples in the data set.
        batch_size: of one forward pass of one process.
        accumulation: forward passes per step.
        processes: processes that share a step.
        seed: of the permutations.
        groups: (size,) int64; samples of one group share steps where they can (see `grouped_permutation`).
        second: how many of the samples, the last ones, are a second set.
        second_share: the share of each step that is of the second set, rounded to samples; some of each at least.
    """

    size: int
    batch_size: int
    accumulation: int = 1
    processes: int = 1
    seed: int = 0
    groups: torch.Tensor | None = None
    second: int = 0
    second_share: float = 0.0

    @property
    def global_batch(self) -> int:
        """Samples per optimiser step over all processes."""
        return self.batch_size * self.accumulation * self.processes

    @property
    def second_per_step(self) -> int:
        """Those of them that are of the second set."""
        if not self.second:
            return 0
        return min(max(1, round(self.second_share * self.global_batch)), self.global_batch - 1)

    def batches(self, first_step: int, last_step: int, process: int) -> Iterator[list[Draw]]:
        """The forward passes of one process for the steps ``first_step`` .. ``last_step - 1``, in order.

        Micro-batch m of step s covers the running numbers from ``s * global_batch + (m * processes + process) *
        batch_size``, so the union over processes is the same whatever their number.
        """
        kept = [(-1, torch.empty(0, dtype=torch.long))] * 2  # epoch and permutation of either set
        for step in range(first_step, last_step):
            for micro in range(self.accumulation):
                start = step * self.global_batch + (micro * self.processes + process) * self.batch_size
                draws = []
                for number in range(start, start + self.batch_size):
                    part, place = self._place(number)
                    size = self.second if part else self.size - self.second
                    if place // size != kept[part][0]:
                        kept[part] = place // size, self._permutation(place // size, part)
                    draws.append(Draw(int(kept[part][1][place % size]), number))
                yield draws

    def _place(self, number: int) -> tuple[int, int]:
        """Which set a running number is of, and its running number among those of that set: spread over the step."""
        step, place = divmod(number, self.global_batch)
        share = self.second_per_step
        before, after = (one * share // self.global_batch for one in (place, place + 1))
        if after > before:
            return 1, step * share + before
        return 0, step * (self.global_batch - share) + place - before

    def _permutation(self, epoch: int, part: int) -> torch.Tensor:
        first = self.size - self.second
        if part:
            return first + torch.randperm(self.second, generator=seeded(self.seed, 5, epoch))
        generator = seeded(self.seed, 0, epoch)
        if self.groups is None:
            return torch.randperm(first, generator=generator)
        batch = self.global_batch - self.second_per_step
        return grouped_permutation(self.groups[:first], epoch * first, batch, generator)


def seeded(seed: int, stream: int, number: int) -> torch.Generator:
    """A generator that depends on the three numbers only; different streams are independent."""
    # SplitMix64's finaliser spreads neighbouring numbers over all 64 bits.
    mixed = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03 + number + 1) * 0xBF58476D1CE4E5B9
    mixed &= 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 30)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return torch.Generator().manual_seed((mixed ^ (mixed >> 31)) & 0x7FFFFFFFFFFFFFFF)


class SampleRandom:
    """Random numbers for a batch, each row depending only on the seed and its draw's running number.

    So noise and times are the same whatever the number of processes, the micro-batch size or the resumed step.
    """

    def __init__(self, seed: int, numbers: list[int], device: torch.device | str = "cpu") -> None:
        self._generators = [seeded(seed, 1, number) for number in numbers]
        self._device = device

    def normal(self, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """(B, *shape) standard normal float32."""
        rows = torch.empty(len(self._generators), *shape)
        for row, generator in zip(rows, self._generators, strict=True):
            row.normal_(generator=generator)
        return rows.to(self._device, non_blocking=True)

    def uniform(self) -> torch.Tensor:
        """(B,) float64, in the open interval (0, 1)."""
        rows = [torch.rand((), dtype=torch.float64, generator=generator) for generator in self._generators]
        return torch.stack(rows).clamp(1e-9, 1 - 1e-9).to(self._device)
