"""The methods: how each pairs its minibatches, and what its network regresses on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentflow.flow import (
    COUPLINGS,
    CondOT,
    Coupling,
    SchrodingerBridge,
    bridge_matching_loss,
    flow_matching_loss,
    reflow_pairs,
    time_grid,
)

from .distributions import TASKS, Task
from .network import Ensemble, Loss, Pool

#: Standard deviation around the straight paths of FM, I-CFM and OT-CFM: that of the authors' published configuration.
SIGMA = 0.1
BRIDGE = SchrodingerBridge(sigma=1.0)


def smeared(sigma: float) -> Loss:
    """CFM: x_t = (1 - t) x0 + t x1 + sigma z, target x1 - x0 (Tong et al. 2023, arXiv:2302.00482, eq. 14-15)."""
    path = CondOT()

    def loss(
        networks: nn.ModuleDict, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator
    ) -> Tensor:
        sample = path.sample(x0, x1, t)
        xt = sample.xt + sigma * torch.randn(x0.shape, generator=generator) if sigma else sample.xt
        return flow_matching_loss(networks["velocity"](xt, t), sample)

    return loss


def lipman(networks: nn.ModuleDict, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """FM: x_t = t x1 + (1 - (1 - sigma) t) x0 from Gaussian noise (Lipman et al. 2022, arXiv:2210.02747, eq. 20-23)."""
    sample = CondOT(sigma_min=SIGMA).sample(x0, x1, t)
    return flow_matching_loss(networks["velocity"](sample.xt, t), sample)


def bridge_flow(
    networks: nn.ModuleDict, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator
) -> Tensor:
    """SB-CFM: the velocity of Brownian bridges alone (Tong et al. 2023, arXiv:2302.00482, sec. 3.2.4)."""
    sample = BRIDGE.sample(x0, x1, t, generator)
    return (networks["velocity"](sample.xt, t) - sample.velocity).square().mean(1)


def bridge_flow_and_score(
    networks: nn.ModuleDict, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator
) -> Tensor:
    """[SF]2M: velocity and score of Brownian bridges, two networks (Tong et al. 2023, arXiv:2307.03672)."""
    sample = BRIDGE.sample(x0, x1, t, generator)
    return bridge_matching_loss(
        networks["velocity"](sample.xt, t), networks["score"](sample.xt, t), sample, BRIDGE
    )


@dataclass(frozen=True, kw_only=True)
class Method:
    """``pairs``: a key of PAIRINGS; ``networks``: one Ensemble for each."""

    title: str
    pairs: str
    loss: Loss
    networks: tuple[str, ...] = ("velocity",)
    tasks: tuple[str, ...] = tuple(TASKS)


_FROM_NORMAL = tuple(name for name in TASKS if name.startswith("normal-"))

METHODS: dict[str, Method] = {
    "ot-cfm": Method(title="OT-CFM", pairs="ot", loss=smeared(SIGMA)),
    "torchcfm": Method(
        title="OT-CFM, torchcfm",
        pairs="torchcfm",
        loss=smeared(SIGMA),  # replaced by torchcfm's own sample: see peer.py
        tasks=("normal-8gaussians", "moons-8gaussians", "normal-moons"),
    ),
    "i-cfm": Method(title="I-CFM", pairs="independent", loss=smeared(SIGMA)),
    "fm": Method(title="FM", pairs="independent", loss=lipman, tasks=_FROM_NORMAL),
    "sf2m": Method(
        title="[SF]²M, exact OT", pairs="ot", loss=bridge_flow_and_score, networks=("velocity", "score")
    ),
    "2-rf": Method(title="2-rectified flow", pairs="rectified", loss=smeared(0.0)),
    "sb-cfm": Method(title="SB-CFM, Sinkhorn", pairs="sinkhorn", loss=bridge_flow),
}

#: Couplings of minibatches; "rectified" and "torchcfm" are made otherwise.
PAIRINGS: dict[str, Callable[[], Coupling]] = {
    "independent": COUPLINGS["independent"],
    "ot": COUPLINGS["ot"],
    "sinkhorn": lambda: BRIDGE.coupling,
}


def build(method: Method, replicates: int, generator: torch.Generator) -> nn.ModuleDict:
    """The untrained networks of a method."""
    return nn.ModuleDict({name: Ensemble(replicates, generator) for name in method.networks})


def draw_pool(task: Task, shape: tuple[int, int, int], generator: torch.Generator) -> Pool:
    """Unpaired minibatches; ``shape``: (replicates, batches, batch)."""
    rows = shape[0] * shape[1] * shape[2]
    x0, x1 = task.source(rows, generator), task.target(rows, generator)
    return Pool(x0.view(*shape, 2), x1.view(*shape, 2))


def pair(pool: Pool, coupling: Coupling, generator: torch.Generator, tick: Callable[[], object]) -> Pool:
    """Each minibatch paired by the coupling."""
    x0, x1 = pool.x0.flatten(0, 1), pool.x1.flatten(0, 1)
    paired = []
    for source, target in zip(x0, x1, strict=True):
        paired.append(coupling(source, target, generator=generator))
        tick()
    return Pool(torch.stack(paired).view_as(pool.x0), pool.x1)


def rectify(pool: Pool, velocity: Ensemble, tick: Callable[[], object]) -> Pool:
    """The pool's source rows with the data that the first flow makes of them by 100 Euler steps."""
    batches = pool.x0.shape[1]
    x1 = []
    for index in range(batches):
        x1.append(reflow_pairs(velocity, pool.x0[:, index].flatten(0, 1), time_grid(100), "euler")[1])
        tick()
    return Pool(pool.x0, torch.stack([rows.view_as(pool.x0[:, 0]) for rows in x1], dim=1))
