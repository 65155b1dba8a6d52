"""Tokens of images: an autoencoder with a codebook (VQ-VAE, arXiv:1711.00937; diffusers' `VQModel`) as a tokenizer.

The token of a cell is the number of the code that is nearest to its raw latent. So the same autoencoder has tokens for
discrete flows, and latents for continuous ones (`encode`, `decode`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..flow.discrete import Codebook
from ..utils.memory import inner_phase
from ..utils.placement import execution_device
from .latents import DECODERS, Autoencoder, decode, finite, latent_channels, normalise, placed, posterior


def has_codebook(vae: Autoencoder) -> bool:
    """Return True for an autoencoder that can be a tokenizer."""
    return hasattr(getattr(vae, "quantize", None), "embedding")


def codebook(vae: Autoencoder) -> Tensor:
    """Return the codes (V, E) float32 as latents, normalised as those of `encode`.

    Raises:
        UserError: the autoencoder has no codebook, or its codes do not fit its latents or are not finite.
    """
    codes = _raw(vae).embeddings
    return normalise(vae, codes[:, :, None, None])[:, :, 0, 0]


def tokenize(vae: Autoencoder, images: Tensor) -> Tensor:
    """Turn images (B, 3, H, W) in [-1, 1] into tokens (B, h, w) int64, 0 to V - 1.

    Raises:
        UserError: see `codebook` and `posterior`.
    """
    codes = _raw(vae)
    return codes.nearest(posterior(vae, images)[0])


def detokenize(vae: Autoencoder, tokens: Tensor) -> Tensor:
    """Turn tokens (B, h, w) into images (B, 3, H, W) float32, nominally in [-1, 1] (not clipped).

    Raises:
        UserError: tokens outside 0 to V - 1 (such as masks) or of another type or shape; see `codebook` and `decode`.
    """
    codes = _raw(vae)
    check_tokens(tokens, len(codes.embeddings))
    if vae in DECODERS:
        return decode(vae, Codebook(codebook(vae)).embed(tokens))

    def images(rows: Tensor) -> tuple[Tensor, ...]:
        # As codes, and never again as the nearest to them: in half precision that may be another.
        options: dict[str, Any] = {"force_not_quantize": True, "return_dict": False}
        if vae.config.get("lookup_from_codebook"):
            given = rows.to(execution_device(vae))
            options["shape"] = (*rows.shape, codes.embeddings.shape[1])
        else:
            given = placed(vae, codes.embed(rows.to(codes.embeddings.device)))
        return (vae.decode(given, **options)[0].float(),)

    with inner_phase("decode"):
        return finite(vae, images, tokens, "image")[0]


def check_tokens(tokens: Tensor, size: int) -> None:
    """Refuse what is not tokens (B, h, w) of a codebook of ``size`` codes.

    Raises:
        UserError: says which token, and what it may be.
    """
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool or tokens.ndim != 3:
        raise UserError(
            f"tokens of shape {tuple(tokens.shape)} and type {str(tokens.dtype).removeprefix('torch.')}",
            "Pass whole numbers (images, height, width), as tokenize returns them.",
        )
    outside = tokens[(tokens < 0) | (tokens >= size)]
    if outside.numel():
        first = int(outside[0])
        fix = (
            f"{size} is the mask: sample up to t = 1, where none is left."
            if first == size
            else "They belong to another tokenizer."
        )
        raise UserError(f"token {first} of a codebook with {size} codes (0 to {size - 1})", fix)


def codebook_use(counts: Tensor, least: float = 0.0) -> dict[str, Tensor]:
    """Return how much of a codebook is used: scalars, float32.

    Args:
        counts: (V,) how often each code is used, or numbers in proportion; where all are 0, nothing is used.
        least: share of an even use, 1 / V, above which a code counts as used.

    Returns:
        ``codebook_used``: share of the codes that are used, 0 to 1. ``perplexity``: exp of the entropy of their
        frequencies, from 1 (one code only) to V (all alike).
    """
    counts = counts.double()
    frequencies = counts / counts.sum().clamp_min(torch.finfo(torch.float64).tiny)
    entropy = -torch.special.xlogy(frequencies, frequencies).sum()
    used = (frequencies * len(counts) > least).double().mean()
    return {"codebook_used": used.float(), "perplexity": entropy.exp().float()}


def count_tokens(tokens: Tensor, size: int) -> Tensor:
    """Return how often each of ``size`` codes is among tokens of any shape: (size,) int64."""
    flat = tokens.flatten()  # bincount waits for a GPU
    return torch.zeros(size, dtype=torch.long, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )


def _raw(vae: Autoencoder) -> Codebook:
    """Return the codes as raw latents, float32."""
    if not has_codebook(vae):
        raise UserError(
            f"an {type(vae).__name__} has no codebook: its latents are no tokens",
            "Take a VQModel, such as `latentflow autoencoder DATA --autoencoder-class vq` trains.",
        )
    table, channels = vae.quantize.embedding, latent_channels(vae)
    # By a call, which brings a table that is offloaded.
    place = "cpu" if table.weight.is_meta else table.weight.device
    codes = table(torch.arange(table.num_embeddings, device=place)).detach()
    if codes.shape[1] != channels:
        raise UserError(
            f"the codebook has {codes.shape[1]} channels, the autoencoder's latents have {channels}",
            "They belong to different autoencoders: copy or download the folder again.",
        )
    return Codebook(codes.float())
