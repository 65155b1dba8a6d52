"""Settings of the velocity network and of the text encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The velocity network. What is left empty comes from `network_preset`."""

    network: Literal["dit", "unet"] = "dit"
    """Class of the network."""
    network_preset: str = "small"
    """Size of a DiT: tiny, small (modern blocks); S, B, L, XL (SiT's)."""
    patch_size: int | None = None
    """Side of the latent patch that is one token (dit)."""
    width: int | None = None
    """Channels of the transformer (dit)."""
    depth: int | None = None
    """Number of blocks (dit)."""
    heads: int | None = None
    """Attention heads (dit)."""
    block: Literal["modern", "plain"] | None = None
    """The next four at once, and the scale of the times (dit): modern (RMSNorm, SwiGLU, rotary positions, normalised
    queries and keys), or plain as in DiT and SiT (LayerNorm, GELU, sin-cos positions)."""
    norm: Literal["rms", "layer"] | None = None
    """Normalisation (dit)."""
    activation: Literal["swiglu", "gelu"] | None = None
    """Feed-forward activation (dit)."""
    position: Literal["rope", "sincos"] | None = None
    """Positions: rotary, or the fixed sin-cos table alone (dit)."""
    qk_norm: bool | None = None
    """Normalise queries and keys (dit)."""
    registers: int | None = None
    """Register tokens (dit)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How captions become tokens."""

    text_encoder: str | None = None
    """A frozen transformers encoder (hub id or folder: CLIP, T5...). Empty: a small one is trained along."""
    text_width: int = 256
    """Channels of the small encoder."""
    text_depth: int = 2
    """Layers of the small encoder."""
    text_heads: int = 4
    """Attention heads of the small encoder."""
    text_length: int = 32
    """Longest caption, in tokens."""
