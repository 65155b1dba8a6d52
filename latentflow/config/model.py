"""Settings of the networks: velocity network, text encoder, autoencoder."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..errors import UserError
from ..utils.flags import Essential


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The velocity network."""

    network: Literal["dit", "unet"] = "dit"
    """Architecture of the velocity network: a transformer (dit) or diffusers' U-Net."""
    network_preset: str = "small"
    """Size of the transformer: tiny or small (modern blocks), or S, B, L, XL as in SiT."""
    patch_size: int | None = None
    """Side of the latent patch that becomes one token (dit). Default: the preset's."""
    width: int | None = None
    """Channels of the transformer (dit). Default: the preset's."""
    depth: int | None = None
    """Number of transformer blocks (dit). Default: the preset's."""
    heads: int | None = None
    """Attention heads (dit). Default: the preset's."""
    block: Literal["modern", "plain"] | None = None
    """Kind of the blocks, which sets the next four flags and the scale of the times together (dit). modern:
    RMSNorm, SwiGLU, rotary positions, normalised queries and keys. plain, as in DiT and SiT: LayerNorm, GELU,
    sin-cos positions. Default: the preset's."""
    norm: Literal["rms", "layer"] | None = None
    """Normalisation layers (dit). Default: those of --block."""
    activation: Literal["swiglu", "gelu"] | None = None
    """Activation of the feed-forward layers (dit). Default: that of --block."""
    position: Literal["rope", "sincos"] | None = None
    """Position encoding: rotary, or a fixed sin-cos table (dit). Default: that of --block."""
    qk_norm: bool | None = None
    """Normalise queries and keys (dit). Default: as --block has it."""
    registers: int | None = None
    """Number of register tokens (dit). Default: the preset's."""
    gradient_checkpointing: bool = False
    """Compute activations a second time in the backward pass instead of storing them: less memory, about a third
    more time."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text encoder for captions."""

    text_encoder: Annotated[str | None, Essential("model")] = None
    """Pretrained text encoder of transformers (hub id or folder), kept frozen. Default: a small one is trained
    along."""
    text_width: int = 256
    """Channels of the small text encoder."""
    text_depth: int = 2
    """Layers of the small text encoder."""
    text_heads: int = 4
    """Attention heads of the small text encoder."""
    text_length: int = 32
    """Longest caption, in tokens; the rest of longer ones is cut off."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The autoencoder that is trained where no --vae is given."""

    autoencoder_class: Literal["dc", "kl"] = "dc"
    """Class of the autoencoder in diffusers. dc: AutoencoderDC with a space-to-channel stem (deterministic, and
    cheaper for the same PSNR; see docs/autoencoder.md). kl: AutoencoderKL."""
    latent_channels: int = 16
    """Number of latent channels."""
    autoencoder_widths: tuple[int, ...] = (16, 64, 128, 256)
    """Channels at each resolution, finest first; n numbers downscale by 2^(n-1). With dc each is 4 times a divisor
    of the one before."""
    encoder_layers: tuple[int, ...] = (0, 1, 1, 2)
    """Residual blocks of the encoder at each resolution; a leading 0 is the space-to-channel stem (dc only)."""
    decoder_layers: tuple[int, ...] = (1, 2, 2, 2)
    """Residual blocks of the decoder at each resolution (kl uses the largest number everywhere)."""
    autoencoder_steps: int | None = None
    """Optimiser steps. Default: --max-train-steps, but at most 3000."""
    autoencoder_batch_size: int = 16
    """Images per step and process."""
    autoencoder_learning_rate: float = 2e-3
    """Peak learning rate."""
    autoencoder_optimizer: Literal["adamw", "muon"] = "muon"
    """Optimiser of the autoencoder."""
    kl_weight: float = 1e-6
    """Weight of the KL term, which is summed over the latent and divided by the number of pixel values (kl
    only)."""
    perceptual_weight: float = 0.0
    """Weight of the perceptual loss LPIPS (needs the extra `lpips` and its VGG weights)."""
    adversarial_weight: float = 0.0
    """Weight of the PatchGAN hinge loss, before the adaptive factor."""
    adversarial_start: int = 1_500
    """First step with the adversarial loss."""
    equivariance: float = 0.0
    """Probability that a step shrinks and turns the latents and decodes them to images that are shrunk and turned
    alike (EQ-VAE, arXiv:2502.09509; 0.5 is usual). 0: off."""
    latent_noise: float = 0.0
    """Strength of the noise that is added to the latents which the decoder learns from: each sample gets between
    none and this many times the latents' spread (as in l-DeTok, arXiv:2507.15856, which goes up to noise alone; 0.5
    is mild). 0: off."""

    def __post_init__(self) -> None:
        if not 0 <= self.equivariance <= 1:
            raise UserError(f"--equivariance is {self.equivariance}", "It must be from 0 to 1.")
        if not 0 <= self.latent_noise < math.inf:
            raise UserError(f"--latent-noise is {self.latent_noise}", "It must be finite, and not negative.")

    def describe(self) -> dict[str, Any]:
        """Return the settings that must not change when a run is resumed.

        Settings that earlier versions did not have are left out where they are off, so that their runs resume.
        """
        later = ("equivariance", "latent_noise")
        return {name: value for name, value in dataclasses.asdict(self).items() if value or name not in later}
