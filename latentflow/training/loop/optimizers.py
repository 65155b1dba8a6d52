"""The optimisers of a run, Muon among them (Jordan et al. 2024; scaling of Liu et al. 2025); learning rates."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from ...config import LoopConfig
from ...errors import UserError, lookup
from .distributed import has_fast_bfloat16, local, part_of, whole

Quintics = tuple[tuple[float, float, float], ...]

# Odd quintics a x + b x^3 + c x^5, applied one after the other to singular values in (0, 1].
# Jordan et al. 2024: steep at 0, singular values end in about [0.7, 1.2].
_JORDAN: Quintics = ((3.4445, -4.7750, 2.0315),) * 5
# Polar Express (Amsel et al. 2025, arXiv:2505.16932, theorem 3.1): each is the best approximation of 1 where the one
# before it has left [0.01, 1], so that three leave it in [0.73, 1.27].
_POLAR: Quintics = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))
QUINTICS = {"jordan": _JORDAN, "polar": _POLAR}


def orthogonalise(matrices: Tensor, iteration: str = "polar") -> Tensor:
    """Return the nearest semi-orthogonal matrices, approximately.

    It runs in bfloat16 where the device computes in it, else in float32.

    Args:
        matrices: (K, M, N), a stack of updates of one shape.
        iteration: a key of ``QUINTICS``.

    Returns:
        (K, M, N); singular values of about 1 (0.7 to 1.3) where the input's are not negligible.
    """
    x = matrices.to(torch.bfloat16 if has_fast_bfloat16(matrices.device) else torch.float32)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    if iteration == "polar":
        # The norm of the Gram matrix is a closer bound of the largest singular value, and so leaves more of the others
        # above 0.01; a hundredth more, for bfloat16.
        bound = 1.01 * gram.float().norm(dim=(-2, -1), keepdim=True).sqrt() + 1e-7
        x, gram = (x / bound).to(x.dtype), (gram / bound.square()).to(x.dtype)
    for number, (a, b, c) in enumerate(QUINTICS[iteration]):
        gram = gram if number == 0 else x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


# torch.optim.Muon takes each parameter as one 2-D matrix, neither parts of a fused one nor convolutions, one by one and
# in bfloat16 on every device; and its state has other names than that of our checkpoints.
class Muon(torch.optim.Optimizer):
    """Muon for weight matrices and convolutions; embeddings, vectors and first and last layers belong to AdamW.

    The orthogonal update is scaled by ``0.2 * sqrt(max(M, N))``, so that its root mean square equals that of a typical
    AdamW step and both optimisers can share one learning rate (Liu et al. 2025, section 2.2). Matrices that stack
    several maps (fused q, k, v) are orthogonalised part by part. Sharded ones are
    put together for it in every process.

    Args:
        groups: parameter groups ``{"params": [...], "parts": k}``: every parameter of a group stacks ``k`` equal maps
            along its output dimension. A convolution (O, I, kh, kw) counts as an (O, I * kh * kw) matrix.
        lr: learning rate.
        momentum: Nesterov momentum.
        weight_decay: decoupled.
        every: update the weights once in so many steps, so many times as far; the momentum sees every gradient.

    A run goes on with the iteration that its checkpoint names: one begun before there was a choice with ``jordan``, and
    with an update in every step.

    Raises:
        ValueError: a parameter has fewer than two dimensions, or its outputs are not divisible by ``parts``.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        every: int = 1,
    ) -> None:
        common = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(groups, common | {"parts": 1, "iteration": "polar", "every": every, "steps": 0})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2 or len(parameter) % group["parts"]:
                    raise ValueError(
                        f"Muon got a parameter of shape {tuple(parameter.shape)} in {group['parts']} parts: "
                        "it takes matrices whose outputs divide evenly; give the others to AdamW"
                    )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        # One batched call for all matrices of a shape: small matrices alone leave the machine idle.
        stacks: dict[tuple[str, torch.Size], list[tuple[nn.Parameter, Tensor, dict[str, Any]]]] = defaultdict(
            list
        )
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            due = group["steps"] % group.get("every", 1) == 0
            for parameter in group["params"]:
                if parameter.grad is not None:
                    momentum = self._momentum(parameter, group["momentum"])
                    if due:
                        matrix = whole(parameter.grad.lerp(momentum, group["momentum"]))
                        matrix = matrix.flatten(1).unflatten(0, (group["parts"], -1))  # (parts, M, N)
                        key = group.get("iteration", "jordan"), matrix.shape[1:]
                        stacks[key].append((parameter, matrix, group))
        for (iteration, shape), members in stacks.items():
            updates = orthogonalise(torch.cat([matrix for _, matrix, _ in members]), iteration)
            sizes = [len(matrix) for _, matrix, _ in members]
            for (parameter, _, group), update in zip(members, updates.split(sizes), strict=True):
                rate = group["lr"] * group.get("every", 1)
                parameter.mul_(1 - rate * group["weight_decay"])
                scale = 0.2 * max(shape) ** 0.5
                update = update.reshape(parameter.shape).to(parameter.dtype)
                parameter.add_(part_of(update, parameter), alpha=-rate * scale)
        return loss

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Return the average of the gradients, with the newest in it."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return average


# Parts of names of parameters that are no inner weight matrices although they have two dimensions or more: embeddings,
# first and last layers, scales. They are AdamW's, whatever the optimiser, and never decayed.
_ENDS = (
    "embed", "shared", "relative", "conv_in", "conv_out", "proj_in", "proj_out", "final", "null", "register", "scale",
)  # fmt: skip


def _is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not any(end in name for end in _ENDS)


def _adam_arguments(parameters: dict[str, nn.Parameter], config: LoopConfig) -> dict[str, Any]:
    """Return the arguments of AdamW and its relatives, with weight decay on inner matrices only."""
    matrices = [each for name, each in parameters.items() if _is_inner_matrix(name, each)]
    vectors = [each for name, each in parameters.items() if not _is_inner_matrix(name, each)]
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
    """Return AdamW with moments in 8 bits, quantised block by block (Dettmers et al. 2022, arXiv:2110.02861)."""
    from bitsandbytes.optim import AdamW8bit

    return [AdamW8bit(**_adam_arguments(parameters, config))]


def adam_bytes(size: int, *, eight_bit: bool) -> int:
    """Return the bytes of AdamW's two moments of a parameter of ``size`` elements: float32, or 8 bits with a float32
    scale for each block of 256 where it has 4096 elements or more."""
    return 2 * (size + 4 * math.ceil(size / 256)) if eight_bit and size >= 4096 else 8 * size


def _schedule_free(parameters: dict[str, nn.Parameter], config: LoopConfig) -> list[torch.optim.Optimizer]:
    """Return AdamW that averages its iterates instead of decaying its rate (Defazio et al. 2024, arXiv:2405.15682).

    It stays in its training mode, where the weights are the paper's y; `evaluated_weights` are its x. A warm-up of the
    rate from outside is what its own would be: it weighs an iterate by the square of the highest rate so far.
    """
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(**_adam_arguments(parameters, config))
    optimizer.train()
    return [optimizer]


def _muon(
    parameters: dict[str, nn.Parameter], config: LoopConfig, *, modulation: bool = False
) -> list[torch.optim.Optimizer]:
    """Return Muon for inner matrices and AdamW for the rest.

    Those of adaLN, a third of Muon's work, are the rest's as well: with AdamW runs of equal time end lower.

    Args:
        modulation: give them to Muon all the same, as in runs begun before.
    """
    stacked: dict[int, list[nn.Parameter]] = defaultdict(list)
    rest: dict[str, nn.Parameter] = {}
    for name, parameter in parameters.items():
        if _is_inner_matrix(name, parameter) and (modulation or "adaLN" not in name):
            stacked[_parts(name, parameter)].append(parameter)
        else:
            rest[name] = parameter
    groups = [{"params": members, "parts": parts} for parts, members in sorted(stacked.items())]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(Muon(groups, lr=config.learning_rate, weight_decay=config.weight_decay, every=2))
    return optimizers + (_adamw(rest, config) if rest else [])


def _parts(name: str, parameter: nn.Parameter) -> int:
    """Count the maps that are stacked in a matrix, by the names that our networks use (field standard)."""
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


def make_optimizers(
    module: nn.Module, config: LoopConfig, saved: Sequence[dict[str, Any]] | None = None
) -> list[torch.optim.Optimizer]:
    """Return optimisers that together own every trainable parameter of ``module``.

    A module may have ``rate_factors``: beginning of parameters' names -> factor on their learning rate.

    Args:
        saved: states of a run's optimisers, which those that are returned are to take up.

    Raises:
        UserError: unknown ``config.optimizer``; a layer decay for a network without layers in a row.
    """
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    make = lookup(OPTIMIZERS, config.optimizer, "optimizer")
    if saved and make is _muon and "iteration" not in saved[0]["param_groups"][0]:
        make = partial(_muon, modulation=True)
    optimizers = make(parameters, config)
    scales = rate_scales(list(parameters), config.lr_layer_decay, config.lr_embeddings)
    for start, factor in getattr(module, "rate_factors", {}).items():
        scales |= {name: factor * scale for name, scale in scales.items() if name.startswith(start)}
    if any(scale != 1.0 for scale in scales.values()):
        _scale_rates(optimizers, {parameter: scales[name] for name, parameter in parameters.items()})
    return optimizers


_TABLES = ("embedding_table", "shared", "embed_tokens")  # of classes and words
_LAST = ("final_layer", "alignment.")  # behind the blocks


def rate_scales(names: Sequence[str], layer_decay: float, embeddings: float) -> dict[str, float]:
    """Return the factor on each parameter's learning rate: ``layer_decay`` to the power of its distance from the end.

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
    """Split the groups by the factor on their learning rate, which they hold as ``lr_scale``."""
    for optimizer in optimizers:
        split: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            for scale in sorted({scales[parameter] for parameter in group["params"]}):
                members = [parameter for parameter in group["params"] if scales[parameter] == scale]
                split.append(group | {"params": members, "lr_scale": scale})
        optimizer.param_groups[:] = split


@torch.no_grad()
def evaluated_weights(optimizers: Iterable[torch.optim.Optimizer]) -> dict[Tensor, Tensor]:
    """Map parameters to the weights that are evaluated, where these are not the trained ones: schedule-free's x.

    From y = (1 - beta1) z + beta1 x (Defazio et al. 2024, eq. 4). For a sharded parameter it is this process's part.
    """
    found: dict[Tensor, Tensor] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # Without z a parameter has had no update yet.
            moved = [parameter for parameter in group["params"] if "z" in optimizer.state[parameter]]
            if moved:
                y = [local(parameter) for parameter in moved]
                z = [local(optimizer.state[parameter]["z"]) for parameter in moved]
                x = torch._foreach_lerp(y, z, 1 - 1 / group["betas"][0])
                found |= dict(zip(moved, x, strict=True))
    return found


_DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


def learning_rate(step: int, config: LoopConfig) -> float:
    """Return the learning rate of ``step`` (0-based): linear warm-up, plateau, decay over ``lr_decay_share``."""
    decay = lookup(_DECAYS, config.lr_scheduler, "lr_scheduler")
    length = max(1.0, config.lr_decay_share * config.max_train_steps)
    done = max(0.0, step - (config.max_train_steps - length)) / length
    warmup = min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    return config.learning_rate * warmup * decay(min(1.0, done))
