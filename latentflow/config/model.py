"""Settings of the networks: velocity network, text encoder, autoencoder."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UserError


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


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The autoencoder that is trained when none is given, and how."""

    autoencoder_class: Literal["dc", "kl"] = "dc"
    """dc: AutoencoderDC with a space-to-channel stem (deterministic; the cheaper one for the same PSNR, see
    docs/autoencoder.md). kl: AutoencoderKL."""
    latent_channels: int = 16
    """Channels of the latents."""
    autoencoder_widths: tuple[int, ...] = (16, 64, 128, 256)
    """Channels at each resolution, finest first; n entries downscale by 2^(n-1). With dc each is 4 times a divisor of
    the one before."""
    encoder_layers: tuple[int, ...] = (0, 1, 1, 2)
    """Residual blocks at each resolution of the encoder; a leading 0 is the space-to-channel stem (dc only)."""
    decoder_layers: tuple[int, ...] = (1, 2, 2, 2)
    """Residual blocks at each resolution of the decoder (kl: the largest number is used everywhere)."""
    autoencoder_steps: int | None = None
    """Optimiser steps. Empty: as many as max_train_steps, but at most 3000."""
    autoencoder_batch_size: int = 16
    """Images in one step of one process."""
    autoencoder_learning_rate: float = 2e-3
    """Peak learning rate."""
    autoencoder_optimizer: Literal["adamw", "muon"] = "muon"
    """Optimiser of the autoencoder."""
    kl_weight: float = 1e-6
    """Weight of the KL term, summed over the latent and divided by the number of pixel values (kl only)."""
    perceptual_weight: float = 0.0
    """Weight of LPIPS (needs the extra `lpips` and its VGG weights)."""
    adversarial_weight: float = 0.0
    """Weight of the PatchGAN hinge loss, before the adaptive factor."""
    adversarial_start: int = 1_500
    """Step from which the adversarial loss counts."""
    equivariance: float = 0.0
    """Probability of a step whose latents are made smaller and turned, and decoded to the images made smaller and
    turned alike (EQ-VAE, arXiv:2502.09509; 0.5 is usual). 0: off."""
    latent_noise: float = 0.0
    """Noise on the latents that the decoder learns from, drawn for each sample between none and this many times their
    spread (as in l-DeTok, arXiv:2507.15856, which goes up to noise alone; 0.5 is mild). 0: off."""

    def __post_init__(self) -> None:
        if not 0 <= self.equivariance <= 1:
            raise UserError(f"--equivariance is {self.equivariance}", "It must be from 0 to 1.")
        if not 0 <= self.latent_noise < math.inf:
            raise UserError(f"--latent-noise is {self.latent_noise}", "It must be finite, and not negative.")

    def describe(self) -> dict[str, Any]:
        """What must not change between resumed runs. Levers that are off are left out: earlier runs had none."""
        levers = ("equivariance", "latent_noise")
        return {name: one for name, one in dataclasses.asdict(self).items() if one or name not in levers}
