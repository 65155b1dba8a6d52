"""The order of samples of which only those of one group, such as one size, fit into a forward pass."""

from __future__ import annotations

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
