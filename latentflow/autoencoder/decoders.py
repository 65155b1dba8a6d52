"""Decoding with another autoencoder than a model's own, such as a tiny one: previews, and images on slow machines.

Tiny autoencoders of the TAESD family take the latents that the flow sees, normalised, in the place of raw ones. Those
of FLUX.2 come from a network with 2 x 2 cells in the channels of each; its tiny autoencoder takes them apart again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .latents import (
    DECODERS,
    Autoencoder,
    decode,
    downscale_factor,
    encode,
    fitting_cells,
    latent_channels,
    load_autoencoder,
)

# PSNR in dB above which an autoencoder knows its own latents, and below which another one does not.
_KNOWN, _UNKNOWN = 20.0, 14.0
_TEST_SIDE = 128


@contextmanager
def decoded_by(vae: Autoencoder, decoder: Autoencoder | None) -> Iterator[None]:
    """Let ``decoder`` decode the latents of ``vae`` within the context; None changes nothing.

    Raises:
        UserError: its latents have another number of channels, or other cells.
    """
    if decoder is None:
        yield
        return
    before = DECODERS.get(vae)
    use_decoder(vae, decoder)
    try:
        yield
    finally:
        if before is None:
            DECODERS.pop(vae, None)
        else:
            DECODERS[vae] = before


def use_decoder(vae: Autoencoder, decoder: Autoencoder) -> None:
    """Let ``decoder`` decode the latents of ``vae`` from now on; `decode` then uses it.

    Raises:
        UserError: its latents have another number of channels, or other cells.
    """
    if fitting_cells(vae, decoder) is None:
        raise UserError(
            f"the autoencoder that is to decode has latents of {_layout_text(decoder)}; those of this checkpoint "
            f"have {_layout_text(vae)}",
            "Take the tiny autoencoder that was made for this model, such as taesd, taesdxl, taesd3, taef1 or taef2.",
        )
    DECODERS[vae] = decoder


def open_decoder(
    name_or_path: str, vae: Autoencoder, device: str | torch.device, **options: Any
) -> Autoencoder:
    """Open an autoencoder that is to decode the latents of ``vae``, on a device.

    Args:
        options: of `load_autoencoder`.

    Raises:
        UserError: it cannot be loaded, or its latents are others; see `check_latent_space`.
    """
    decoder = load_autoencoder(name_or_path, **options).to(device)
    check_latent_space(vae, decoder)
    return decoder


@torch.no_grad()
def check_latent_space(vae: Autoencoder, decoder: Autoencoder) -> None:
    """Refuse a decoder that was made for another latent space of the same layout.

    A test image with soft colours is encoded by ``vae`` and decoded by both. Nothing is refused where ``vae`` itself
    does not know the image.

    Raises:
        UserError: the decoder makes something else of it; says the two PSNRs.
    """
    across = torch.linspace(-1.0, 1.0, _TEST_SIDE)
    columns, rows = across.expand(_TEST_SIDE, -1), across[:, None].expand(-1, _TEST_SIDE)
    image = 0.8 * torch.stack([columns, rows, (2.0 * columns * rows).sin()])[None]
    latents = encode(vae, image)
    own = _psnr(decode(vae, latents), image)
    with decoded_by(vae, decoder):
        other = _psnr(decode(vae, latents), image)
    if own > _KNOWN and other < _UNKNOWN:
        raise UserError(
            f"the autoencoder that is to decode belongs to another latent space: a test image comes back with "
            f"{other:.0f} dB (PSNR), and {own:.0f} dB from the checkpoint's own",
            "Take the tiny autoencoder that was made for this model.",
        )


def _psnr(images: Tensor, wanted: Tensor) -> float:
    error = F.mse_loss(images.clamp(-1.0, 1.0).cpu() / 2.0, wanted / 2.0)
    return float(-10.0 * error.clamp_min(1e-10).log10())


def _layout_text(vae: Autoencoder) -> str:
    factor = downscale_factor(vae)
    return f"{latent_channels(vae)} channels and cells of {factor} x {factor} pixels"
