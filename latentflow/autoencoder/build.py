"""New autoencoders, of diffusers' classes, at a size that fits the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, VQModel
from torch import Tensor

from ..errors import UserError, check_resolution
from .latents import Autoencoder

if TYPE_CHECKING:
    from ..config import AutoencoderConfig


def build_autoencoder(config: AutoencoderConfig, resolution: int) -> Autoencoder:
    """Build a new autoencoder for (3, resolution, resolution) images.

    Raises:
        UserError: the resolution is not divisible by the downscale factor, or the widths do not go together (the
            nearest valid ones are named), or the numbers of widths and layers differ.
    """
    levels = len(config.autoencoder_widths)
    if not levels == len(config.encoder_layers) == len(config.decoder_layers):
        raise UserError(
            f"autoencoder_widths has {levels} entries, encoder_layers {len(config.encoder_layers)}, "
            f"decoder_layers {len(config.decoder_layers)}",
            "Give one entry for each resolution in all three.",
        )
    check_resolution(resolution, 2 ** (levels - 1))
    if config.autoencoder_class == "dc":
        return _dc(config)
    if config.has_codebook:
        return _vq(config, resolution)
    return AutoencoderKL(**_convolutions(config, resolution))


def _dc(config: AutoencoderConfig) -> AutoencoderDC:
    levels = len(config.autoencoder_widths)
    if config.autoencoder_widths[-1] % config.latent_channels:
        raise UserError(
            f"the last of autoencoder_widths, {config.autoencoder_widths[-1]}, is not a multiple of "
            f"latent_channels, {config.latent_channels}",
            "AutoencoderDC averages groups of channels into the latent: choose a multiple.",
        )
    _check_widths(config)
    return AutoencoderDC(
        latent_channels=config.latent_channels,
        encoder_block_out_channels=config.autoencoder_widths,
        decoder_block_out_channels=config.autoencoder_widths,
        encoder_layers_per_block=config.encoder_layers,
        decoder_layers_per_block=config.decoder_layers,
        encoder_qkv_multiscales=((),) * levels,
        decoder_qkv_multiscales=((),) * levels,
    )


def _check_widths(config: AutoencoderConfig) -> None:
    """Refuse widths between which AutoencoderDC has no shortcut.

    Going down it averages groups of the 4 a channels of 2 x 2 pixels to b channels, going up it repeats b channels to
    4 a: both need b to divide 4 a, and its space-to-channel layers need 4 to divide b.
    """
    widths = config.autoencoder_widths
    # Where neither has a block at full size, the first width is not used.
    first = 0 if config.encoder_layers[0] or config.decoder_layers[0] else 1
    wrong = [
        f"{a} {b}"
        for level, (a, b) in enumerate(pairwise(widths))
        if b % 4 or (level >= first and a % (b // 4))
    ]
    if wrong:
        nearest = (*widths[:first], *_nearest_widths(widths[first:], config.latent_channels))
        raise UserError(
            f"autoencoder_widths {' '.join(map(str, widths))}: AutoencoderDC cannot join "
            f"{' nor '.join(wrong)}; each width must be 4 times a divisor of the one before",
            f"The nearest that work: --autoencoder-widths {' '.join(map(str, nearest))}",
        )


def _nearest_widths(wanted: Sequence[int], latent_channels: int) -> tuple[int, ...]:
    """Multiples of 4, each 4 times a divisor of the one before, with the least sum of |log(width / wanted)|."""
    most = 4 * max(wanted)  # the least common multiple of 4 and latent_channels, repeated, is one
    chains: dict[int, tuple[float, tuple[int, ...]]] = {  # the best by their last width
        width: (abs(math.log(width / wanted[0])), (width,)) for width in range(4, most + 1, 4)
    }
    for aim in wanted[1:]:
        longer = [
            (cost + abs(math.log(4 * (end // part) / aim)), (*chain, 4 * (end // part)))
            for end, (cost, chain) in chains.items()
            for part in range(1, 17)
            if end % part == 0 and 4 * (end // part) <= most
        ]
        chains = {chain[-1]: (cost, chain) for cost, chain in sorted(longer, reverse=True)}
    return min(chain for end, chain in chains.items() if end % latent_channels == 0)[1]


def _vq(config: AutoencoderConfig, resolution: int) -> VQModel:
    codes = None if config.autoencoder_class == "vq" else grid(config.fsq_levels)
    size, width = (config.codebook_size, config.codebook_width) if codes is None else codes.shape
    vae = VQModel(num_vq_embeddings=size, vq_embed_dim=width, **_convolutions(config, resolution))
    if codes is not None:
        with torch.no_grad():
            vae.quantize.embedding.weight.copy_(codes)
    return vae


def grid(levels: Sequence[int]) -> Tensor:
    """Return the codes (V, len(levels)) of finite scalar quantisation: even values of each channel from -1 to 1.

    The token counts in the levels' mixed radix, the first channel fastest. To round each channel of a clamped latent to
    its levels (Mentzer et al. 2023, arXiv:2309.15505; the bound and the even levels of Parker et al. 2024,
    arXiv:2411.19842, section 3.2) is to take the nearest of these codes: so a `VQModel` holds it as it is.
    """
    axes = [torch.linspace(-1.0, 1.0, count) for count in reversed(levels)]
    return torch.cartesian_prod(*axes).reshape(-1, len(levels)).flip(1)


def _convolutions(config: AutoencoderConfig, resolution: int) -> dict[str, Any]:
    """Return the arguments of the classes that are made of Stable Diffusion's encoder and decoder."""
    levels = len(config.autoencoder_widths)
    return {
        "latent_channels": config.latent_channels,
        "block_out_channels": config.autoencoder_widths,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": max(1, *config.encoder_layers, *config.decoder_layers),
        "norm_num_groups": math.gcd(8, *config.autoencoder_widths),
        "mid_block_add_attention": False,
        "sample_size": resolution,
        "scaling_factor": 1.0,
    }
