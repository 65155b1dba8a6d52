"""Norms without weights of their own, and what queries and keys go through: their norm and rotary positions."""

# mypy: disable-error-code=no-any-return
# Functions of torch return Any.

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .inputs import rotate

Norm = Callable[[Tensor], Tensor]


def has_tangent(*tensors: Tensor) -> bool:
    """Return True if a forward derivative is being taken through any of these, as by ``torch.func.jvp``.

    False under a compiler, which cannot ask and does not differentiate forwards.
    """
    if torch.compiler.is_compiling():
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def as_it_is(x: Tensor) -> AbstractContextManager[Any]:
    """Keep autocast from norms of ``x``, which sum in float32 whatever its type.

    On a GPU it would make float32 of x, and of all that the norm's result goes into.
    """
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension, without weights: adaLN scales and shifts."""
    with as_it_is(x):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _inverse_rms(x: Tensor) -> Tensor:
    """Return 1 / root mean square over the last dimension, which is kept, in float32 or better."""
    with as_it_is(x):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x.shape[-1] ** 0.5 / (norm.to(torch.promote_types(x.dtype, torch.float32)) + 1e-6)


class _RMSNorm(torch.autograd.Function):
    """y = x / rms(x). Its Jacobian is symmetric: one formula serves backward and forward derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * _inverse_rms(x).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        """v / rms - x <v, x> / (D rms^3)."""
        (x,) = ctx.saved_tensors
        inverse = _inverse_rms(x)
        along = (v * x).sum(dim=-1, keepdim=True, dtype=inverse.dtype) * inverse**3 / x.shape[-1]
        return torch.addcmul(v * inverse.to(x.dtype), x, -along.to(x.dtype))

    jvp = backward


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without weights; the sum of squares is taken in float32."""
    # On the CPU torch has no fused kernel; ours takes a third of the time with its derivative. Elsewhere torch's fused
    # kernel has no forward derivative, ours has. Compilers fuse the formula by themselves, and cannot look into it.
    if not torch.compiler.is_compiling() and (x.device.type == "cpu" or has_tangent(x)):
        return _RMSNorm.apply(x)
    with as_it_is(x):
        return F.rms_norm(x, x.shape[-1:], eps=1e-12)


class _NormalisedAndTurned(torch.autograd.Function):
    """`rms_norm` of x (B, N, heads, d), times ``scale`` (heads * d,), turned by `rotate`; to the last bit the same.

    On a CPU in a third less time with its derivative: half of the passes over memory.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        inverse = _inverse_rms(x)
        normalised = x * inverse.to(x.dtype)
        return _turned(normalised.mul_(scale.view(x.shape[-2:]).to(x.dtype)), cos, sin), inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, turned: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Turn back, scale, and leave out the part along x, as `_RMSNorm` does."""
        x, scale, cos, sin, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # the derivative is to be differentiated
            output = _normalised_and_turned(x, scale, cos, sin)
            return *torch.autograd.grad(output, (x, scale), turned, create_graph=True), None, None
        factor = scale.view(x.shape[-2:]).to(x.dtype)
        v = _turned(turned.contiguous(), cos, -sin)  # attention's gradient has the heads before the tokens
        normalised = x * inverse.to(x.dtype)
        product = v * normalised
        of_scale = product.sum((0, 1)).reshape(scale.shape).to(scale.dtype)
        along = product.mul_(factor).sum(dim=-1, keepdim=True, dtype=inverse.dtype) / -x.shape[-1]
        v = v.mul_(factor).addcmul_(normalised, along.to(x.dtype)).mul_(inverse.to(x.dtype))
        return v, of_scale, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate`, without a rolled copy."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _normalised_and_turned(x: Tensor, scale: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(rms_norm(x) * scale.view(x.shape[-2:]).to(x.dtype), cos, sin)


def normalised_and_turned(x: Tensor, scale: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return queries and keys x (B, N, heads, d) after their norm, its weights (heads * d,) and `rotate`."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not has_tangent(x, scale):
        return _NormalisedAndTurned.apply(x, scale, cos, sin)[0]
    return _normalised_and_turned(x, scale, cos, sin)


NORMS: dict[str, Norm] = {"rms": rms_norm, "layer": layer_norm}
