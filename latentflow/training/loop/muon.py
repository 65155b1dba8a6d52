"""Muon: momentum whose matrix updates are orthogonalised (Jordan et al. 2024; scaling of Liu et al. 2025)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

from .precision import has_fast_bfloat16
from .sharding import part_of, whole

# Quintic Newton-Schulz coefficients of Jordan et al. 2024: steep at 0, singular values end in about [0.7, 1.2].
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, approximately, by ``steps`` Newton-Schulz iterations,
    in bfloat16 where the device computes in it, else in float32.

    Args:
        matrices: (K, M, N), a stack of updates of one shape.

    Returns:
        (K, M, N); singular values of about 1 (0.7 to 1.2) where the input's are not negligible.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.to(torch.bfloat16 if has_fast_bfloat16(matrices.device) else torch.float32)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


# torch.optim.Muon takes each parameter as one 2-D matrix: neither the parts of a fused one nor convolutions.
class Muon(torch.optim.Optimizer):
    """Muon for weight matrices and convolutions; embeddings, vectors and first and last layers belong to AdamW.

    The orthogonal update is scaled by ``0.2 * sqrt(max(M, N))``, so that its root mean square equals that of a typical
    AdamW step and both optimisers can share one learning rate (Liu et al. 2025, section 2.2). Matrices that stack
    several maps (fused q, k, v; the shift, scale and gate of adaLN) are orthogonalised part by part. Sharded ones are
    put together for it in every process.

    Args:
        groups: parameter groups ``{"params": [...], "parts": k}``: every parameter of a group stacks ``k`` equal maps
            along its output dimension. A convolution (O, I, kh, kw) counts as an (O, I * kh * kw) matrix.
        lr: learning rate.
        momentum: Nesterov momentum.
        weight_decay: decoupled.

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
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})
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
        """One update of all parameters that have a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        # One batched call for all matrices of a shape: small matrices alone leave the machine idle.
        by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor, dict[str, Any]]]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    matrix = whole(self._momentum_update(parameter, group["momentum"]))
                    matrix = matrix.flatten(1).unflatten(0, (group["parts"], -1))  # (parts, M, N)
                    by_shape[matrix.shape[1:]].append((parameter, matrix, group))
        for shape, members in by_shape.items():
            updates = orthogonalise(torch.cat([matrix for _, matrix, _ in members]))
            sizes = [len(matrix) for _, matrix, _ in members]
            for (parameter, _, group), update in zip(members, updates.split(sizes), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                scale = 0.2 * max(shape) ** 0.5
                update = update.reshape(parameter.shape).to(parameter.dtype)
                parameter.add_(part_of(update, parameter), alpha=-group["lr"] * scale)
        return loss

    def _momentum_update(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)
