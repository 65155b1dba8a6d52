"""Autoencoders: loading any of diffusers', normalised latents, and the losses for training new ones."""

from __future__ import annotations

from .build import build_autoencoder as build_autoencoder
from .decoders import check_latent_space as check_latent_space
from .decoders import decoded_by as decoded_by
from .decoders import open_decoder as open_decoder
from .decoders import use_decoder as use_decoder
from .latents import Autoencoder as Autoencoder
from .latents import decode as decode
from .latents import denormalise as denormalise
from .latents import downscale_factor as downscale_factor
from .latents import encode as encode
from .latents import has_statistics as has_statistics
from .latents import in_float32 as in_float32
from .latents import latent_channels as latent_channels
from .latents import load_autoencoder as load_autoencoder
from .latents import measure_statistics as measure_statistics
from .latents import normalise as normalise
from .latents import normalised_posterior as normalised_posterior
from .latents import posterior as posterior
from .masked import filled as filled
from .masked import latent_mask as latent_mask
from .masked import mask_channels as mask_channels
from .masked import masked_condition as masked_condition
from .masked import masked_latents as masked_latents
from .masked import masked_source as masked_source
from .tiling import use_tiles as use_tiles
from .tokens import codebook as codebook
from .tokens import codebook_use as codebook_use
from .tokens import count_tokens as count_tokens
from .tokens import detokenize as detokenize
from .tokens import has_codebook as has_codebook
from .tokens import tokenize as tokenize
