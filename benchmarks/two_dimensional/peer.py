"""torchcfm beside ours, where it is installed: its pairing, its samples, the same network, optimiser and steps."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from latentflow.flow import COUPLINGS, CondOT, flow_matching_loss

from .distributions import Task
from .methods import SIGMA
from .network import Ensemble, Pool, optimizer


def installed() -> bool:
    """Whether torchcfm can be imported."""
    return importlib.util.find_spec("torchcfm") is not None


def seed_everything(seed: int) -> None:
    """torchcfm draws from the global generators of torch and of NumPy."""
    import numpy as np

    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def pair(pool: Pool, tick: Callable[[], object]) -> Pool:
    """Each minibatch resampled from its exact plan, as torchcfm does it (with replacement)."""
    from torchcfm.optimal_transport import OTPlanSampler

    sampler = OTPlanSampler(method="exact")
    pairs = []
    for source, target in zip(pool.x0.flatten(0, 1), pool.x1.flatten(0, 1), strict=True):
        pairs.append(sampler.sample_plan(source, target))
        tick()
    x0, x1 = (torch.stack(rows).view_as(pool.x0) for rows in zip(*pairs, strict=True))
    return Pool(x0, x1)


def loss(networks: nn.ModuleDict, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """Its sample of the path between rows that are paired already, and its target."""
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

    t, xt, target = ConditionalFlowMatcher(sigma=SIGMA).sample_location_and_conditional_flow(x0, x1, t=t)
    return (networks["velocity"](xt, t) - target).square().mean(1)


def step_times(task: Task, batch: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each training step of one network, drawing aside and pairing included, ours and theirs in turn."""
    from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher

    generator = torch.Generator().manual_seed(0)
    seed_everything(0)
    matcher, coupling, path = ExactOptimalTransportConditionalFlowMatcher(SIGMA), COUPLINGS["ot"](), CondOT()

    def ours(network: Ensemble, x0: Tensor, x1: Tensor) -> Tensor:
        t = torch.rand(batch, generator=generator)
        sample = path.sample(coupling(x0, x1), x1, t)
        xt = sample.xt + SIGMA * torch.randn(x0.shape, generator=generator)
        return flow_matching_loss(network(xt, t), sample).mean()

    def torchcfm(network: Ensemble, x0: Tensor, x1: Tensor) -> Tensor:
        t, xt, target = matcher.sample_location_and_conditional_flow(x0, x1)
        return (network(xt, t) - target).square().mean()

    sides = []
    for side in (ours, torchcfm):
        network = Ensemble(1, torch.Generator().manual_seed(1))
        sides.append((side, network, optimizer(list(network.parameters()))))
    times: dict[str, list[float]] = {"ours": [], "torchcfm": []}
    for step in range(-3, steps):  # three steps to warm up
        x0, x1 = task.source(batch, generator), task.target(batch, generator)
        for side, network, update in sides[:: 1 if step % 2 else -1]:
            start = time.perf_counter()
            value = side(network, x0, x1)
            update.zero_grad()
            value.backward()
            update.step()
            if step >= 0:
                times[side.__name__].append(time.perf_counter() - start)
    return times


def describe(times: dict[str, list[float]]) -> str:
    """Medians and the ratio ours / torchcfm, step by step, with its quartiles."""
    ratios = [ours / theirs for ours, theirs in zip(times["ours"], times["torchcfm"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    ours, theirs = (1e3 * statistics.median(times[side]) for side in ("ours", "torchcfm"))
    return (
        f"ours {ours:.1f} ms, torchcfm {theirs:.1f} ms; ratio: median {middle:.2f}, "
        f"quartiles {low:.2f} to {high:.2f}, {len(ratios)} pairs of steps"
    )
