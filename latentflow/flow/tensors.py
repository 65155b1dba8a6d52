"""Helpers on tensors for the whole of ``flow``: broadcasting of t, and the precision of the maths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..errors import UserError

#: advice where a network's output is not finite
NOT_FINITE = (
    "If the network computes in float16, use bfloat16 (--dtype bfloat16) or float32. Else its weights are damaged, or "
    "its training failed: look at the log."
)
#: dx/dt at (x, t): x is (B, ...), t a scalar tensor or (B,), the result is shaped like x.
Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]

#: The source of random numbers: one generator for the whole batch, one for each row, or torch's global one.
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The precision to calculate in: that of the tensors, but never below float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def time_dtype(device: torch.device) -> torch.dtype:
    """The precision of a time on ``device``: float64 where there is one."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def expand_t(t: Tensor | float, x: Tensor) -> Tensor:
    """``t`` shaped so that it broadcasts along the rows of ``x`` and along nothing else.

    The only place that broadcasts t: a bare (B,) would broadcast along the last dimension of x, silently
    wrong whenever B equals the width.

    Args:
        t: a scalar or (B,), in [0, 1].
        x: (B, ...).

    Returns:
        () or (B, 1, ..., 1), in t's precision (at least float32; float64 for a Python number), on t's device.

    Raises:
        ValueError: t has another shape; or, where it is on the CPU, lies outside [0, 1] or is NaN (a GPU would have to
            be waited for).
    """
    t = t if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float64)
    t = t.to(compute_dtype(t))
    if t.ndim and t.shape != x.shape[:1]:
        raise ValueError(
            f"t has shape {tuple(t.shape)} but x has shape {tuple(x.shape)}: "
            f"pass a scalar t or one t per row, shape ({x.shape[0] if x.ndim else 1},)"
        )
    # `not inside` rather than `outside`, so that NaN is refused too.
    if t.device.type == "cpu" and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(
            f"t must lie in [0, 1] (t = 0 is noise, t = 1 is data) but spans "
            f"[{t.min().item():g}, {t.max().item():g}]; divide timesteps by their count, or clamp t"
        )
    return per_row(t, x)


def per_row(values: Tensor, x: Tensor) -> Tensor:
    """Return ``values``, () or (B,), as () or (B, 1, ..., 1), to multiply the rows of ``x`` (B, ...)."""
    return values.reshape(values.shape + (1,) * (x.ndim - 1)) if values.ndim else values


def by_row(x: Tensor) -> Tensor:
    """Return the elements of each row of ``x`` (B, ...): (B, N), where a row of (B,) has one."""
    return x[..., None].flatten(1)


def with_time_rows(velocity: Velocity) -> Velocity:
    """Wrap ``velocity`` so that a network may be passed as it is.

    An `nn.Module` is called with t of shape (B,), in the precision of x (at least float32), as it was in training. Any
    other callable gets t as the caller has it, usually a scalar tensor, so that ``lambda x, t: (1 - x) * t`` is right
    for every shape of x.
    """
    if not isinstance(velocity, nn.Module):
        return velocity
    network = velocity

    def with_rows(x: Tensor, t: Tensor) -> Tensor:
        value: Tensor = network(x, t.to(x.device, compute_dtype(x)).expand(len(x)))
        return value

    return with_rows


def require_finite(value: Tensor, what: str, fix: str) -> None:
    """Refuse values that are NaN or infinite.

    Raises:
        UserError: some values are not finite; the message counts them.
    """
    # One pass that only reads: a sum is finite unless an element is not, or unless it overflows by itself.
    if math.isfinite(value.detach().sum()):
        return
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise UserError(f"{what} is not finite: {bad} of {value.numel()} values are NaN or infinite", fix)


def require_graph(value: Tensor, velocity: Callable[[Tensor], Tensor], x: Tensor, what: str) -> None:
    """Refuse a velocity whose ``value`` at ``x`` has no graph to x although it depends on x: its derivative is hidden.

    A velocity that does not depend on x needs no graph: its derivative is 0, as that of whole numbers is almost
    everywhere. The check evaluates it at another point.

    Args:
        what: the derivative's name in the error: "divergence", "gradient".

    Raises:
        UserError: it depends on x.
    """
    if not value.is_floating_point():
        return
    with torch.no_grad():
        elsewhere = velocity(x + 0.37 * (1.0 + x.abs()))
    if not torch.allclose(elsewhere, value, rtol=0.0, atol=0.0, equal_nan=True):
        raise UserError(
            f"the velocity has no graph to x, so its {what} is unknown",
            "Compute it without torch.no_grad, inference_mode and detach.",
        )


def paired(x: Tensor, generators: Sequence[torch.Generator]) -> list[tuple[Tensor, torch.Generator]]:
    """Return each row of ``x`` with its generator.

    Raises:
        ValueError: there is not one for each row.
    """
    if len(generators) != len(x):
        raise ValueError(
            f"{len(generators)} generators for {len(x)} rows: pass one for each row, or a single one"
        )
    return [*zip(x, generators, strict=True)]


def normal_like(x: Tensor, generator: Generators) -> Tensor:
    """Draw standard normal numbers in the shape and dtype of ``x``, on the generator's device.

    Raises:
        ValueError: there are several generators, but not one for each row.
    """
    if isinstance(generator, Sequence):
        return torch.stack([normal_like(row, source) for row, source in paired(x, generator)])
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)


def uniform_like(x: Tensor, generator: Generators, count: int) -> Tensor:
    """Draw ``count`` uniform numbers in [0, 1) for each element of ``x``: (count, B, ...), float64 where there is one.

    Raises:
        ValueError: there are several generators, but not one for each row.
    """
    if isinstance(generator, Sequence):
        return torch.stack([uniform_like(row, source, count) for row, source in paired(x, generator)], 1)
    device = x.device if generator is None else generator.device
    drawn = torch.rand((count, *x.shape), generator=generator, dtype=time_dtype(device), device=device)
    narrower = time_dtype(x.device) != drawn.dtype
    return (drawn * (1.0 - 2.0**-24) if narrower else drawn).to(
        x.device, time_dtype(x.device)
    )  # rounded below 1
