"""The run of an autoencoder from top to bottom: networks, data, training, export."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from ..autoencoder import (
    Autoencoder,
    build_autoencoder,
    codebook_use,
    count_tokens,
    decode,
    downscale_factor,
    encode,
    load_autoencoder,
    measure_statistics,
    tokenize,
)
from ..autoencoder.losses import PatchDiscriminator
from ..config import AutoencoderConfig, DataConfig, LoopConfig
from ..data import Source, cached_pixels, fingerprint, pixels_to_images, to_pil
from ..errors import UserError, check_resolution
from ..metrics import psnr, ssim
from ..utils.files import restore_permissions
from .fine_tune.base import refuse_own_result
from .loop.fit import Callbacks, fit
from .loop.run_folder import writing
from .loop.stopping import Stop
from .losses.autoencoder import AutoencoderLoss, DiscriminatorLoss, autoencoder_steps
from .losses.latent_data import PixelData
from .report.export import carry_over

_STATISTICS_IMAGES = 1024
_VALIDATION_IMAGES, _SHOWN = 256, 16


def train_autoencoder(
    training: Source,
    validation: Source,
    config: AutoencoderConfig,
    loop: LoopConfig,
    output: Path,
    data: DataConfig,
    *,
    init_from: str | None = None,
    decoder_only: bool = False,
    resume_command: str = "",
    stop: Stop | None = None,
) -> Autoencoder | None:
    """Train (or go on training) an autoencoder in ``output``; its best weights end in ``output / "autoencoder"``.

    Args:
        training, validation: images to learn from, and held-out ones for PSNR and SSIM (may be empty).
        config: the autoencoder. loop: its ``autoencoder_*`` settings replace the loop's steps, batch and learning rate.
        data: resolution, background and flips of the images.
        init_from: the autoencoder to start from, in place of a new one; a folder or hub id.
        decoder_only: train its decoder only; encoder and latent statistics stay as they are, bit for bit.
        stop: receives the signal that stopped the run; see `fit`.

    Returns:
        The autoencoder with the averaged weights and measured latent statistics; None if a signal stopped the run.

    Raises:
        UserError: the resolution is not divisible by its downscale factor (the nearest valid one is named), or
            ``init_from`` is no autoencoder that can be trained here.
    """
    # ---- networks ----
    loop = autoencoder_loop(config, loop)
    torch.manual_seed(loop.seed)
    if init_from is None:
        vae = build_autoencoder(config, data.resolution)
    else:
        vae = trainable_autoencoder(init_from, output, data.resolution, decoder_only=decoder_only)
    vae = vae.to(memory_format=torch.channels_last)
    discriminator = PatchDiscriminator() if config.adversarial_weight else None
    loss = AutoencoderLoss(vae, config, loop.seed, discriminator, loop.random_numbers)
    modules: dict[str, nn.Module] = {"autoencoder": loss}
    if discriminator is not None:
        modules["discriminator"] = DiscriminatorLoss(discriminator, loss)

    # ---- data ----
    pixels = cached_pixels(training, data.resolution, data.background)
    held_out = None
    if len(validation):
        validation = validation.subset(validation.spread(_VALIDATION_IMAGES))
        held_out = pixels_to_images(cached_pixels(validation, data.resolution, data.background)[:])
    shown = pixels_to_images(pixels[training.spread(_SHOWN)])
    if held_out is not None:
        shown = held_out[validation.spread(_SHOWN)]

    # ---- validation, preview, export ----
    def validate() -> dict[str, float]:
        assert held_out is not None
        reconstruction = torch.cat(list(reconstructions(vae, held_out)))
        figures = {"psnr": float(psnr(reconstruction, held_out).mean())}
        if data.resolution >= 11:
            figures["ssim"] = float(ssim(reconstruction, held_out).mean())
        if config.has_codebook:
            tokens = torch.cat([tokenize(vae, batch) for batch in held_out.split(32)])
            use = codebook_use(count_tokens(tokens, vae.config.num_vq_embeddings))
            figures |= {name: float(value) for name, value in use.items()}
        return figures

    def preview() -> Image.Image:
        """Show originals above their reconstructions."""
        from torchvision.utils import make_grid

        rows = torch.cat([shown, torch.cat(list(reconstructions(vae, shown)))])
        return to_pil(make_grid(rows.clamp(-1, 1), nrow=len(shown), padding=2, pad_value=1.0))

    def export(folder: Path) -> None:
        if not decoder_only:
            rows = torch.linspace(0, len(pixels) - 1, min(len(pixels), _STATISTICS_IMAGES)).long()
            measure_statistics(vae, pixels_to_images(pixels[rows]).split(64))
        with writing(f"the autoencoder {output / 'autoencoder'}", output):
            vae.save_pretrained(folder)
            restore_permissions(folder)
            carry_over(output / "autoencoder", folder)

    # ---- training ----
    finished = fit(
        modules,
        PixelData(training, pixels, flips=data.random_flip),
        loop,
        output,
        callbacks=Callbacks(
            validate=None if held_out is None else validate,
            preview=preview,
            export=export,
            export_to=output / "autoencoder",
        ),
        description={
            "autoencoder": describe(config, None if init_from is None else vae, decoder_only=decoder_only),
            "resolution": data.resolution,
            "data": training.fingerprint(),
            "data_order": training.order(),
        },
        resume_line=resume_command,
        phase="train the autoencoder",
        stop=stop,
    )
    return load_autoencoder(output / "autoencoder") if finished else None


def trainable_autoencoder(name: str, output: Path, resolution: int, *, decoder_only: bool) -> Autoencoder:
    """Load the autoencoder that a run in ``output`` starts from, in float32; its encoder is frozen if ``decoder_only``.

    Raises:
        UserError: its class cannot be trained here, the resolution does not fit, or it is the run's own result.
    """
    refuse_own_result(name, output, "autoencoder")
    vae = load_autoencoder(name)
    if not isinstance(vae, (AutoencoderDC, AutoencoderKL)):
        raise UserError(
            f"--init-from {name}: a {type(vae).__name__} cannot be trained on",
            "AutoencoderDC and AutoencoderKL can; others are used as they are: latentflow train --vae.",
        )
    check_resolution(resolution, downscale_factor(vae))
    vae = vae.float().train()
    if decoder_only:
        vae.requires_grad_(False)
        for part in (vae.decoder, getattr(vae, "post_quant_conv", None)):
            if part is not None:
                part.requires_grad_(True)
    return vae


def describe(config: AutoencoderConfig, start: Autoencoder | None, *, decoder_only: bool) -> dict[str, Any]:
    """Return what must not change when the run is resumed. Of ``start`` these are its weights, wherever they lie."""
    if start is None:
        return config.describe()
    return config.describe() | {"init_from": fingerprint(start), "decoder_only": decoder_only}


def autoencoder_loop(config: AutoencoderConfig, loop: LoopConfig) -> LoopConfig:
    """Return the loop's settings for the autoencoder."""
    return dataclasses.replace(
        loop,
        max_train_steps=autoencoder_steps(config.autoencoder_steps, loop.max_train_steps),
        train_batch_size=config.autoencoder_batch_size,
        gradient_accumulation_steps=1,
        learning_rate=config.autoencoder_learning_rate,
        optimizer=config.autoencoder_optimizer,
        lr_scheduler="linear",
        lr_decay_share=0.7,
        ema_lengths=(),
        lr_layer_decay=1.0,
        early_stop=0,
        shard=False,  # small, and an adversarial step needs weights of both networks at once
    )


def reconstructions(vae: Autoencoder, images: Tensor) -> Iterator[Tensor]:
    """Decode posterior means, in batches, on the CPU."""
    with torch.no_grad():
        for batch in images.split(32):
            yield decode(vae, encode(vae, batch)).cpu()
