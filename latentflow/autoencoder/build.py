"""Our own autoencoders: diffusers' classes at a size fit for the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusers import AutoencoderDC, AutoencoderKL

from ..errors import UserError
from .latents import Autoencoder


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The autoencoder that is trained when none is given, and how."""

    autoencoder_class: Literal["dc", "kl"] = "dc"
    """dc: AutoencoderDC with a space-to-channel stem (deterministic; the cheaper one for the same PSNR, see
    docs/autoencoder.md). kl: AutoencoderKL."""
    latent_channels: int = 16
    """Channels of the latents."""
    autoencoder_widths: tuple[int, ...] = (16, 64, 128, 256)
    """Channels at each resolution, finest first; n entries downscale by 2^(n-1)."""
    encoder_layers: tuple[int, ...] = (0, 1, 1, 2)
    """Residual blocks at each resolution of the encoder; a leading 0 is the space-to-channel stem (dc only)."""
    decoder_layers: tuple[int, ...] = (1, 2, 2, 2)
    """Residual blocks at each resolution of the decoder (kl: the largest number is used everywhere)."""
    autoencoder_steps: int | None = None
    """Optimiser steps. Empty: as many as max_train_steps, but at most 3000."""
    autoencoder_batch_size: int = 16
    """Images per step."""
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


def build_autoencoder(config: AutoencoderConfig, resolution: int) -> Autoencoder:
    """A new autoencoder for (3, resolution, resolution) images.

    Raises:
        UserError: the resolution is not divisible by the downscale factor (the nearest valid one is named), or the
            numbers of widths and layers differ.
    """
    levels = len(config.autoencoder_widths)
    if not levels == len(config.encoder_layers) == len(config.decoder_layers):
        raise UserError(
            f"autoencoder_widths has {levels} entries, encoder_layers {len(config.encoder_layers)}, "
            f"decoder_layers {len(config.decoder_layers)}",
            "Give one entry for each resolution in all three.",
        )
    check_resolution(resolution, 2 ** (levels - 1))
    return _dc(config) if config.autoencoder_class == "dc" else _kl(config, resolution)


def check_resolution(resolution: int, factor: int) -> None:
    """Refuse a resolution that an autoencoder with this downscale factor cannot take.

    Raises:
        UserError: it is not divisible; the nearest valid one is named.
    """
    if resolution % factor:
        nearest = max(1, round(resolution / factor)) * factor
        raise UserError(
            f"resolution {resolution} is not divisible by the autoencoder's downscale factor {factor}",
            f"Use --resolution {nearest}.",
        )


def _dc(config: AutoencoderConfig) -> AutoencoderDC:
    levels = len(config.autoencoder_widths)
    if config.autoencoder_widths[-1] % config.latent_channels:
        raise UserError(
            f"the last of autoencoder_widths, {config.autoencoder_widths[-1]}, is not a multiple of "
            f"latent_channels, {config.latent_channels}",
            "AutoencoderDC averages groups of channels into the latent: choose a multiple.",
        )
    return AutoencoderDC(
        latent_channels=config.latent_channels,
        encoder_block_out_channels=config.autoencoder_widths,
        decoder_block_out_channels=config.autoencoder_widths,
        encoder_layers_per_block=config.encoder_layers,
        decoder_layers_per_block=config.decoder_layers,
        encoder_qkv_multiscales=((),) * levels,
        decoder_qkv_multiscales=((),) * levels,
    )


def _kl(config: AutoencoderConfig, resolution: int) -> AutoencoderKL:
    levels = len(config.autoencoder_widths)
    return AutoencoderKL(
        latent_channels=config.latent_channels,
        block_out_channels=config.autoencoder_widths,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=max(1, *config.encoder_layers, *config.decoder_layers),
        norm_num_groups=min(8, *config.autoencoder_widths),
        mid_block_add_attention=False,
        sample_size=resolution,
        scaling_factor=1.0,
    )
