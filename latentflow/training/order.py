"""Which sample is used when: a pure function of the seed and the step, so that resuming needs no stored state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .grouped_order import grouped_permutation


@dataclass(frozen=True, slots=True)
class Draw:
    """One use of one sample: its index in the data set and the running number of this use over the whole run."""

    index: int
    number: int


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """Every epoch is a fresh permutation; batches run on across epoch ends, so no sample is dropped or repeated.

    Args:
        size: samples in the data set.
        batch_size: of one forward pass of one process.
        accumulation: forward passes per step.
        processes: processes that share a step.
        seed: of the permutations.
        groups: (size,) int64; samples of one group share steps where they can (see `grouped_permutation`).
    """

    size: int
    batch_size: int
    accumulation: int = 1
    processes: int = 1
    seed: int = 0
    groups: torch.Tensor | None = None

    @property
    def global_batch(self) -> int:
        """Samples per optimiser step over all processes."""
        return self.batch_size * self.accumulation * self.processes

    def batches(self, first_step: int, last_step: int, process: int) -> Iterator[list[Draw]]:
        """The forward passes of one process for the steps ``first_step`` .. ``last_step - 1``, in order.

        Micro-batch m of step s covers the running numbers from ``s * global_batch + (m * processes + process) *
        batch_size``, so the union over processes is the same whatever their number.
        """
        epoch, permutation = -1, torch.empty(0, dtype=torch.long)
        for step in range(first_step, last_step):
            for micro in range(self.accumulation):
                start = step * self.global_batch + (micro * self.processes + process) * self.batch_size
                draws = []
                for number in range(start, start + self.batch_size):
                    if number // self.size != epoch:
                        epoch = number // self.size
                        permutation = self._permutation(epoch)
                    draws.append(Draw(int(permutation[number % self.size]), number))
                yield draws

    def _permutation(self, epoch: int) -> torch.Tensor:
        generator = seeded(self.seed, 0, epoch)
        if self.groups is None:
            return torch.randperm(self.size, generator=generator)
        return grouped_permutation(self.groups, epoch * self.size, self.global_batch, generator)


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
