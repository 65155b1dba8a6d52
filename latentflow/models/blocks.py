"""The transformer block of `DiT`: self-attention, cross-attention to text, feed-forward, under adaLN-zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from .embeddings import linear, rotate

Norm = Callable[[Tensor], Tensor]


def has_tangent(*tensors: Tensor) -> bool:
    """Return True if a forward derivative is being taken through any of these, as by ``torch.func.jvp``.

    A compiler cannot ask; nor does it differentiate forwards.
    """
    if torch.compiler.is_compiling():
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension, without weights: adaLN scales and shifts."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _inverse_rms(x: Tensor) -> Tensor:
    """1 / root mean square over the last dimension, kept, in float32 or better."""
    # The sum runs in float32 whatever the type of x; autocast would only add a copy of x in float32.
    with torch.autocast(x.device.type, enabled=False):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse: Tensor = x.shape[-1] ** 0.5 / (norm.to(torch.promote_types(x.dtype, torch.float32)) + 1e-6)
    return inverse


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
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _RMSNorm._derivative(ctx.saved_tensors[0], gradient)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _RMSNorm._derivative(ctx.saved_tensors[0], tangent)

    @staticmethod
    def _derivative(x: Tensor, v: Tensor) -> Tensor:
        """v / rms - x <v, x> / (D rms^3)."""
        inverse = _inverse_rms(x)
        along = (v * x).sum(dim=-1, keepdim=True, dtype=inverse.dtype) * inverse**3 / x.shape[-1]
        return torch.addcmul(v * inverse.to(x.dtype), x, -along.to(x.dtype))


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without weights; the sum of squares is taken in float32."""
    # On the CPU torch has no fused kernel; ours takes a third of the time with its derivative. Elsewhere torch's fused
    # kernel has no forward derivative, ours has. Compilers fuse the formula by themselves, and cannot look into it.
    if not torch.compiler.is_compiling() and (x.device.type == "cpu" or has_tangent(x)):
        out: Tensor = _RMSNorm.apply(x)
        return out
    return F.rms_norm(x, x.shape[-1:], eps=1e-12)


NORMS: dict[str, Norm] = {"rms": rms_norm, "layer": layer_norm}


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D) * (1 + scale) + shift, both (B, 1, D)."""
    return torch.addcmul(shift, x, 1 + scale)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for (B, heads, N, d); ``mask`` (B, L) bool, True = a key that is seen.

    Differentiable backwards and forwards; forwards it holds the N x L scores and their tangents.
    """
    # Fused kernels have no forward derivative. On short sequences the CPU's is slower than plain matrix products in
    # half precision (2.5 times forward, 5 times with its gradient, 64 tokens), and up to 40 % faster in float32.
    slower = q.device.type == "cpu" and q.dtype.itemsize < 4 and k.shape[-2] <= 256
    if not slower and not has_tangent(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    out: Tensor = scores.softmax(dim=-1) @ v
    return out


class Attention(nn.Module):
    """Self-attention over (B, N, D), by choice with rotary positions and normalised queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear(width, 3 * width)
        self.proj = linear(width, width)
        # The weights of queries' and keys' RMSNorm (arXiv:2302.05442), for every head its own.
        self.qk_scale = nn.Parameter(torch.ones(2 * width)) if qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, tokens, width = x.shape
        qk, v = self.qkv(x).split([2 * width, width], dim=-1)
        if self.qk_scale is not None:
            qk = rms_norm(qk.unflatten(-1, (2 * self.heads, -1))).flatten(2) * self.qk_scale.to(qk.dtype)
        qk = qk.unflatten(-1, (2 * self.heads, -1))
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.transpose(1, 2).chunk(2, dim=1)  # (B, heads, N, head_dim)
        out = attention(q, k, v.unflatten(-1, (self.heads, -1)).transpose(1, 2))
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, width))
        return projected


class CrossAttention(nn.Module):
    """Attention of (B, N, D) to text tokens (B, L, D); padding is masked."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = linear(width, width)
        self.kv = linear(width, 2 * width)
        self.proj = linear(width, width, zero=True)  # starts closed

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q = self.q(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
        k, v = self.kv(text).view(batch, text.shape[1], 2 * self.heads, -1).transpose(1, 2).chunk(2, dim=1)
        out = attention(q, k, v, mask)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, width))
        return projected


class GeluMlp(nn.Module):
    """Two layers with a tanh-approximated GELU between them."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = linear(width, int(width * ratio))
        self.fc2 = linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class SwiGluMlp(nn.Module):
    """SwiGLU (arXiv:2002.05202) with two thirds of the hidden width, so that the parameters stay as many."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = -(-int(width * ratio * 2 / 3) // 32) * 32  # rounded up, for the matrix units
        self.fc1 = linear(width, 2 * hidden)
        self.fc2 = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        out: Tensor = self.fc2(F.silu(gate) * value)
        return out


MLPS: dict[str, Callable[[int, float], nn.Module]] = {"swiglu": SwiGluMlp, "gelu": GeluMlp}


class DiTBlock(nn.Module):
    """One block of DiT (arXiv:2212.09748, figure 3, adaLN-zero); cross-attention to text in the middle."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, norm: Norm, activation: str, qk_norm: bool, text: bool
    ) -> None:
        super().__init__()
        self.norm = norm
        self.attn = Attention(width, heads, qk_norm)
        self.cross_attn = CrossAttention(width, heads) if text else None
        self.mlp = MLPS[activation](width, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(width, 6 * width, zero=True))

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, N, D), c (B, D), text (B, L, D), text_mask (B, L) -> (B, N, D)."""
        vectors = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = vectors
        x = torch.addcmul(x, gate_attn, self.attn(modulate(self.norm(x), shift_attn, scale_attn), rope))
        if self.cross_attn is not None:
            x = x + self.cross_attn(self.norm(x), text, text_mask)
        return torch.addcmul(x, gate_mlp, self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """Tokens (B, N, D) -> features of their patches (B, N, features)."""

    def __init__(self, width: int, features: int, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        self.linear = linear(width, features, zero=True)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(width, 2 * width, zero=True))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        out: Tensor = self.linear(modulate(self.norm(x), shift, scale))
        return out
