"""The order of samples, and generators for what loads them: pure functions of the seed and the sample's id."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


def grouped_permutation(groups: Tensor, first: int, batch: int, generator: torch.Generator) -> Tensor:
    """Return a random permutation of all samples in which each batch holds one group as far as the numbers go.

    Only samples of one group, such as one size, fit into a forward pass. Batches begin at sample ids that are multiples
    of ``batch``, whatever the epoch: the batch that the epoch before left unfinished is completed first. What does not
    fill a batch of its group shares one with the neighbouring groups' rest; such batches are passed through the network
    in parts. So nothing is left out or used twice.

    Args:
        groups: (N,) int64, each sample's group.
        first: sample id of the permutation's first sample.
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
class SampleUse:
    """One use of one sample: its index in the data set, and the id of this use, which counts over the whole run."""

    index: int
    sample_id: int


class Stream(IntEnum):
    """Streams of random numbers of a run, which are independent of one another; their values never change."""

    ORDER = 0  # of the samples of an epoch
    NOISE = 1  # and times, dropped conditions, whatever else `TwisterRandom` draws; `CounterRandom` needs no stream
    COUPLING = 2
    CAPTIONS = 3
    MASKS = 3  # drawn by numpy: as independent as another number would be
    CROPS = 4
    MIXIN_ORDER = 5
    TEACHER_SAMPLES = 6  # samples of the prior, and pairs
    AUTOENCODER = 7
    CONTROL = 11  # dropped control images, drawn by numpy; evaluation has 8 to 10 and 12
    CODEBOOK = 13  # the latents that dead codes start from again


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """The samples of every step: each epoch is a fresh permutation, and batches run on across epoch ends.

    So no sample is dropped or repeated. Where a second set is mixed in, each set has epochs of its own, and every step
    has the same number of samples of each.

    Args:
        size: samples in the data set.
        batch_size: samples in one forward pass of one process.
        accumulation: forward passes per step.
        processes: processes that share a step.
        seed: of the permutations.
        groups: (size,) int64; samples of one group share steps where they can (see `grouped_permutation`).
        mixin_count: size of the mixed-in data set, whose samples come last; 0: there is none.
        mixin_share: its share of every step, rounded to samples; at least one sample of each set.
    """

    size: int
    batch_size: int
    accumulation: int = 1
    processes: int = 1
    seed: int = 0
    groups: torch.Tensor | None = None
    mixin_count: int = 0
    mixin_share: float = 0.0

    @property
    def global_batch(self) -> int:
        """Samples per optimiser step over all processes."""
        return self.batch_size * self.accumulation * self.processes

    @property
    def mixin_per_step(self) -> int:
        """Samples per step of the mixed-in set."""
        if not self.mixin_count:
            return 0
        return min(max(1, round(self.mixin_share * self.global_batch)), self.global_batch - 1)

    def batches(self, first_step: int, last_step: int, process: int) -> Iterator[list[SampleUse]]:
        """Yield the forward passes of one process for the steps ``first_step`` .. ``last_step - 1``, in order.

        Micro-batch m of step s covers the sample ids from ``s * global_batch + (m * processes + process) *
        batch_size``, so the union over processes is the same whatever their number.
        """
        kept = [(-1, torch.empty(0, dtype=torch.long))] * 2  # epoch and permutation of either set
        for step in range(first_step, last_step):
            for micro in range(self.accumulation):
                start = step * self.global_batch + (micro * self.processes + process) * self.batch_size
                uses = []
                for sample_id in range(start, start + self.batch_size):
                    mixin, place = self._place(sample_id)
                    size = self.mixin_count if mixin else self.size - self.mixin_count
                    if place // size != kept[mixin][0]:
                        kept[mixin] = place // size, self._permutation(place // size, mixin)
                    uses.append(SampleUse(int(kept[mixin][1][place % size]), sample_id))
                yield uses

    def _place(self, sample_id: int) -> tuple[int, int]:
        """Map a sample id to the set (1: mixed in) and the id within it; the mixed-in set is spread over the step."""
        step, place = divmod(sample_id, self.global_batch)
        share = self.mixin_per_step
        before, after = (place * share // self.global_batch for place in (place, place + 1))
        if after > before:
            return 1, step * share + before
        return 0, step * (self.global_batch - share) + place - before

    def _permutation(self, epoch: int, mixin: int) -> torch.Tensor:
        first = self.size - self.mixin_count
        if mixin:
            generator = seeded(self.seed, Stream.MIXIN_ORDER, epoch)
            return first + torch.randperm(self.mixin_count, generator=generator)
        generator = seeded(self.seed, Stream.ORDER, epoch)
        if self.groups is None:
            return torch.randperm(first, generator=generator)
        batch = self.global_batch - self.mixin_per_step
        return grouped_permutation(self.groups[:first], epoch * first, batch, generator)


def seeded(seed: int, stream: int, number: int) -> torch.Generator:
    """Return a generator that depends on the three numbers only; different streams are independent."""
    # SplitMix64's finaliser spreads neighbouring numbers over all 64 bits.
    mixed = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03 + number + 1) * 0xBF58476D1CE4E5B9
    mixed &= 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 30)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return torch.Generator().manual_seed((mixed ^ (mixed >> 31)) & 0x7FFFFFFFFFFFFFFF)
