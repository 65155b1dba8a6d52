"""Tiny autoencoders with random weights, of every class of diffusers that images use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

from ..families.components import autoencoder_dc

SIDE = 32
BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
}  # fmt: skip
VIDEO = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True],
    "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.8, 1.2, 1.0, 0.9],
}  # fmt: skip
#: class -> (how a tiny one is built, channels, factor)
AUTOENCODERS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "AutoencoderKL": (
        lambda: diffusers.AutoencoderKL(block_out_channels=(8, 8, 8), scaling_factor=0.6, shift_factor=0.1, **BLOCKS),
        4,
        4,
    ),
    "AsymmetricAutoencoderKL": (
        lambda: diffusers.AsymmetricAutoencoderKL(
            down_block_types=BLOCKS["down_block_types"], down_block_out_channels=(8, 8, 8),
            up_block_types=BLOCKS["up_block_types"], up_block_out_channels=(8, 8, 8), norm_num_groups=4,
        ),
        4,
        4,
    ),
    "AutoencoderKLFlux2": (lambda: flux2(), 16, 8),
    "AutoencoderTiny": (
        lambda: diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
        ),
        4,
        4,
    ),
    "AutoencoderDC": (autoencoder_dc, 4, 2),
    "VQModel": (
        lambda: diffusers.VQModel(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), latent_channels=3, norm_num_groups=4,
        ),
        3,
        2,
    ),
    "AutoencoderKLQwenImage": (lambda: diffusers.AutoencoderKLQwenImage(**VIDEO), 4, 4),
    "AutoencoderKLWan": (lambda: diffusers.AutoencoderKLWan(**VIDEO), 4, 4),
    "AutoencoderKLWan with patches": (
        lambda: diffusers.AutoencoderKLWan(
            **VIDEO, is_residual=True, in_channels=12, out_channels=12, patch_size=2
        ),
        4,
        8,
    ),
    "AutoencoderKLHunyuanImage": (
        lambda: diffusers.AutoencoderKLHunyuanImage(
            in_channels=3, out_channels=3, latent_channels=32, block_out_channels=(32, 64, 64), layers_per_block=1,
            spatial_compression_ratio=4, sample_size=SIDE, scaling_factor=0.75,
        ),
        32,
        4,
    ),
    "AutoencoderKLKVAE": (
        lambda: diffusers.AutoencoderKLKVAE(
            channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 1, 1)
        ),
        4,
        4,
    ),
    "AutoencoderRAE": (
        lambda: diffusers.AutoencoderRAE(
            encoder_type="mae", encoder_hidden_size=64, encoder_patch_size=8, encoder_num_hidden_layers=1,
            decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=16, patch_size=8, encoder_input_size=SIDE, image_size=SIDE,
            latents_mean=torch.full((64, 1, 1), 0.2), latents_std=torch.full((64, 1, 1), 0.7),
        ),
        64,
        8,
    ),
}  # fmt: skip


def flux2() -> Any:
    vae = diffusers.AutoencoderKLFlux2(block_out_channels=(8, 8, 8), **BLOCKS)
    vae.bn.running_mean.copy_(torch.linspace(-0.3, 0.3, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 1.5, 16))
    return vae
