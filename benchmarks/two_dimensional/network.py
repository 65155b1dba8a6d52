"""The network of the benchmark, and its training: all replicates (seeds) at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Ensemble(nn.Module):
    """Independent perceptrons (x, t) -> R^2 with three hidden layers of 64 SELU units, one per replicate.

    They share tensors, not weights, so that small networks cost one call. The rows of x are those of the first
    replicate, then those of the second, and so on: (replicates * B, 2), with t a scalar or (replicates * B,).
    """

    def __init__(self, replicates: int, generator: torch.Generator) -> None:
        super().__init__()
        self.replicates = replicates
        sizes = [3, 64, 64, 64, 2]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in itertools.pairwise(sizes):
            for parameters, rows in ((self.weights, inputs), (self.biases, 1)):  # as nn.Linear starts
                start = 2.0 * torch.rand(replicates, rows, outputs, generator=generator) - 1.0
                parameters.append(nn.Parameter(start / inputs**0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.cat([x, t.to(x.dtype).expand(len(x)).unsqueeze(1)], dim=1).unflatten(
            0, (self.replicates, -1)
        )
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, F.selu(h) if layer else h, weight)
        return h.flatten(0, 1)


class Pool(NamedTuple):
    """Paired minibatches: ``x0`` and ``x1``, (replicates, batches, batch, 2)."""

    x0: Tensor
    x1: Tensor


#: (networks, x0, x1, t, generator) -> the loss of each row.
Loss: TypeAlias = Callable[[nn.ModuleDict, Tensor, Tensor, Tensor, torch.Generator], Tensor]


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW as in the paper."""
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-5, fused=True)


def train(
    networks: nn.ModuleDict,
    loss: Loss,
    pool: Pool,
    steps: int,
    generator: torch.Generator,
    tick: Callable[[], object],
) -> None:
    """Visit the minibatches of the pool in a new random order each time, each replicate its own."""
    replicates, batches, batch = pool.x0.shape[:3]
    parameters = optimizer(list(networks.parameters()))
    every = torch.arange(replicates)
    for step in range(steps):
        if step % batches == 0:
            order = torch.rand(replicates, batches, generator=generator).argsort(1)
        rows = order[:, step % batches]
        x0, x1 = pool.x0[every, rows].flatten(0, 1), pool.x1[every, rows].flatten(0, 1)
        t = torch.rand(replicates * batch, generator=generator)
        # The sum of the replicates' mean losses: no replicate's gradient depends on another.
        value = loss(networks, x0, x1, t, generator).sum() / batch
        parameters.zero_grad()
        value.backward()
        parameters.step()
        tick()
