"""Optimisers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn

from ..errors import lookup
from .config import LoopConfig
from .muon import Muon

# Parts of names that mark what is no inner weight matrix although it has two dimensions or more: embeddings, first and
# last layers, scales. AdamW's, whatever the optimiser, and never decayed.
_ENDS = (
    "embed", "shared", "relative", "conv_in", "conv_out", "proj_in", "proj_out", "final", "null", "register", "scale",
)  # fmt: skip


def _is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not any(end in name for end in _ENDS)


def _adamw(parameters: dict[str, nn.Parameter], config: LoopConfig) -> list[torch.optim.Optimizer]:
    matrices = [one for name, one in parameters.items() if _is_inner_matrix(name, one)]
    vectors = [one for name, one in parameters.items() if not _is_inner_matrix(name, one)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # fused: one pass over memory for each tensor; on CPU as well.
    return [
        torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            fused=True,
        )
    ]


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
    "muon": _muon,
}


def make_optimizers(module: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """The optimisers that together own every trainable parameter of ``module``.

    Raises:
        UserError: unknown ``config.optimizer``.
    """
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    return lookup(OPTIMIZERS, config.optimizer, "optimizer")(parameters, config)


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
