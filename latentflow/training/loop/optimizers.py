"""Optimisers and learning-rate schedules by name."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError, lookup
from .config import LoopConfig
from .muon import Muon
from .sharding import local

# Parts of names that mark what is no inner weight matrix although it has two dimensions or more: embeddings, first and
# last layers, scales. AdamW's, whatever the optimiser, and never decayed.
_ENDS = (
    "embed", "shared", "relative", "conv_in", "conv_out", "proj_in", "proj_out", "final", "null", "register", "scale",
)  # fmt: skip


def _is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not any(end in name for end in _ENDS)


def _adam_arguments(parameters: dict[str, nn.Parameter], config: LoopConfig) -> dict[str, Any]:
    """What AdamW and its relatives are made from: weight decay on inner matrices only."""
    matrices = [one for name, one in parameters.items() if _is_inner_matrix(name, one)]
    vectors = [one for name, one in parameters.items() if not _is_inner_matrix(name, one)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return {
        "params": [group for group in groups if group["params"]],
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
    }


def _adamw(parameters: dict[str, nn.Parameter], config: LoopConfig) -> list[torch.optim.Optimizer]:
    # fused: one pass over memory for each tensor; on CPU as well.
    return [torch.optim.AdamW(**_adam_arguments(parameters, config), fused=True)]


def _adamw_8bit(parameters: dict[str, nn.Parameter], config: LoopConfig) -> list[torch.optim.Optimizer]:
    """AdamW with moments in 8 bits, quantised block by block (Dettmers et al. 2022, arXiv:2110.02861)."""
    from bitsandbytes.optim import AdamW8bit

    return [AdamW8bit(**_adam_arguments(parameters, config))]


def _schedule_free(parameters: dict[str, nn.Parameter], config: LoopConfig) -> list[torch.optim.Optimizer]:
    """AdamW that averages its iterates instead of decaying its rate (Defazio et al. 2024, arXiv:2405.15682).

    It stays in its training mode, where the weights are the paper's y; `evaluated_weights` are its x. A warm-up of the
    rate from outside is what its own would be: it weighs an iterate by the square of the highest rate so far.
    """
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(**_adam_arguments(parameters, config))
    optimizer.train()
    return [optimizer]


def _muon(parameters: dict[str, nn.Parameter], config: LoopConfig) -> list[torch.optim.Optimizer]:
    stacked: dict[int, list[nn.Parameter]] = defaultdict(list)
    rest: dict[str, nn.Parameter] = {}
    for name, parameter in parameters.items():
        if _is_inner_matrix(name, parameter):
            stacked[_parts(name, parameter)].append(parameter)
        else:
            rest[name] = parameter
    groups = [{"params": members, "parts": parts} for parts, members in sorted(stacked.items())]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(Muon(groups, lr=config.learning_rate, weight_decay=config.weight_decay))
    return optimizers + (_adamw(rest, config) if rest else [])


def _parts(name: str, parameter: nn.Parameter) -> int:
    """How many maps are stacked in a matrix, by the names that our networks use (field standard)."""
    outputs, inputs = parameter.shape[0], parameter.shape[1:].numel()
    if "qkv" in name:
        return 3
    if "adaLN" in name or ".kv." in name:
        return max(1, outputs // inputs) if outputs % inputs == 0 else 1
    return 1


OPTIMIZERS: dict[str, Callable[[dict[str, nn.Parameter], LoopConfig], list[torch.optim.Optimizer]]] = {
    "adamw": _adamw,
    "adamw-8bit": _adamw_8bit,
    "muon": _muon,
    "schedule-free": _schedule_free,
}


def make_optimizers(module: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """The optimisers that together own every trainable parameter of ``module``.

    Raises:
        UserError: unknown ``config.optimizer``; a layer decay for a network without
            layers in a row.
    """
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    optimizers = lookup(OPTIMIZERS, config.optimizer, "optimizer")(parameters, config)
    if config.lr_layer_decay != 1.0 or config.lr_embeddings != 1.0:
        scales = rate_scales(list(parameters), config.lr_layer_decay, config.lr_embeddings)
        _scale_rates(optimizers, {one: scales[name] for name, one in parameters.items()})
    return optimizers


_TABLES = ("embedding_table", "shared", "embed_tokens")  # of classes and words
_LAST = ("final_layer", "alignment.")  # behind the blocks


def rate_scales(names: Sequence[str], layer_decay: float, embeddings: float) -> dict[str, float]:
    """The factor on each parameter's learning rate: ``layer_decay`` to the power of its distance from the end.

    As in ELECTRA (arXiv:2003.10555) and BEiT (arXiv:2106.08254): with n blocks the last one has the distance 1, the
    first one n, what is before the blocks n + 1, what is after them 0. Tables of classes and words have the factor
    ``embeddings`` alone: their new rows have everything to learn, and old ones move only when they are asked for.

    Raises:
        UserError: a decay for a network that has no blocks in a row, as a U-Net.
    """
    found = {name: re.search(r"\bnetwork\.blocks\.(\d+)\.", name) for name in names}
    blocks = {name: int(match[1]) for name, match in found.items() if match}
    if layer_decay != 1.0 and not blocks:
        raise UserError(
            "--lr-layer-decay needs a network of blocks in a row", "Leave it out, or use --network dit."
        )
    count = max(blocks.values(), default=-1) + 1

    def scale(name: str) -> float:
        if any(part in name for part in _TABLES):
            return embeddings
        if any(part in name for part in _LAST):
            return 1.0
        return float(layer_decay ** (count - blocks.get(name, -1)))

    return {name: scale(name) for name in names}


def _scale_rates(optimizers: Sequence[torch.optim.Optimizer], scales: dict[nn.Parameter, float]) -> None:
    """Part the groups by the factor on their learning rate, which they hold as ``lr_scale``."""
    for optimizer in optimizers:
        parted: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            for scale in sorted({scales[one] for one in group["params"]}):
                members = [one for one in group["params"] if scales[one] == scale]
                parted.append(group | {"params": members, "lr_scale": scale})
        optimizer.param_groups[:] = parted


@torch.no_grad()
def evaluated_weights(optimizers: Iterable[torch.optim.Optimizer]) -> dict[Tensor, Tensor]:
    """Parameter -> the weights to judge it by, where they are not those that are trained: schedule-free's x.

    From y = (1 - beta1) z + beta1 x (Defazio et al. 2024, eq. 4). Of a sharded parameter it is this process's part.
    """
    found: dict[Tensor, Tensor] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # Without z a parameter has had no update yet.
            moved = [one for one in group["params"] if "z" in optimizer.state[one]]
            if moved:
                y, z = [local(one) for one in moved], [local(optimizer.state[one]["z"]) for one in moved]
                x = torch._foreach_lerp(y, z, 1 - 1 / group["betas"][0])
                found |= dict(zip(moved, x, strict=True))
    return found


_DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


def learning_rate(step: int, config: LoopConfig) -> float:
    """The learning rate of ``step`` (0-based): linear warm-up, plateau, then the decay over ``lr_decay_share``."""
    decay = lookup(_DECAYS, config.lr_scheduler, "lr_scheduler")
    length = max(1.0, config.lr_decay_share * config.max_train_steps)
    done = max(0.0, step - (config.max_train_steps - length)) / length
    warmup = min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    return config.learning_rate * warmup * decay(min(1.0, done))
