"""The transformer block of `DiT`: self-attention, cross-attention to text, feed-forward, under adaLN-zero."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .embeddings import linear, rotate

Norm = Callable[[Tensor], Tensor]


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension, without weights: adaLN scales and shifts."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without weights; the sum of squares is taken in float32."""
    # torch's own rms_norm has no fused kernel on the CPU, and upcasts the whole input.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse: Tensor = x.shape[-1] ** 0.5 / (norm + 1e-6)
    return x * inverse.to(x.dtype)


NORMS: dict[str, Norm] = {"rms": rms_norm, "layer": layer_norm}


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D) * (1 + scale) + shift, both (B, 1, D)."""
    return torch.addcmul(shift, x, 1 + scale)


class Attention(nn.Module):
    """Self-attention over (B, N, D), by choice with rotary positions and normalised queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear(width, 3 * width)
        self.proj = linear(width, width)
        # Weights of the RMSNorm of queries and of keys (arXiv:2302.05442), shared by the heads.
        self.qk_scale = nn.Parameter(torch.ones(2, 1, width // heads)) if qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, -1)
        qk, v = qkv[:, :, :2], qkv[:, :, 2]
        if self.qk_scale is not None:
            qk = rms_norm(qk) * self.qk_scale.to(qk.dtype)
        qk = qk.flatten(2, 3)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.transpose(1, 2).chunk(2, dim=1)  # (B, heads, N, head_dim)
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2))
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
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
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
