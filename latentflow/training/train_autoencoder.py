"""The run of an autoencoder: its data, training and export; and which autoencoder a generator's run uses."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import make_grid

from ..autoencoder import (
    Autoencoder,
    build_autoencoder,
    check_resolution,
    decode,
    downscale_factor,
    encode,
    has_statistics,
    load_autoencoder,
    measure_statistics,
)
from ..autoencoder.losses import PatchDiscriminator
from ..config import AutoencoderConfig, DataConfig, LoopConfig
from ..data import Source, cached_pixels, pixels_to_images, to_pil
from ..metrics import psnr, ssim
from .loop.fit import Callbacks, fit
from .loop.folders import writing
from .loop.stopping import Stop
from .losses.autoencoder import AutoencoderLoss, DiscriminatorLoss, autoencoder_steps
from .losses.latent_data import PixelData
from .report.export import carry_over

log = logging.getLogger(__name__)

_STATISTICS_IMAGES = 1024


def train_autoencoder(
    train: Source,
    validation: Source,
    config: AutoencoderConfig,
    loop: LoopConfig,
    output: Path,
    *,
    resolution: int,
    background: str,
    flips: bool,
    resume_line: str = "",
    stop: Stop | None = None,
) -> Autoencoder | None:
    """Train (or go on training) an autoencoder in ``output``; its best weights end in ``output / "autoencoder"``.

    Args:
        train, validation: images to learn from, and held-out ones for PSNR and SSIM (may be empty).
        config: what to train. loop: how; the ``autoencoder_*`` settings replace its steps, batch and learning rate.
        stop: is told which signal stopped the run; see `fit`.

    Returns:
        The autoencoder with the averaged weights and measured latent statistics; None if a signal stopped the run.
    """
    loop = autoencoder_loop(config, loop)
    torch.manual_seed(loop.seed)
    vae = build_autoencoder(config, resolution).to(memory_format=torch.channels_last)
    discriminator = PatchDiscriminator() if config.adversarial_weight else None
    stage = AutoencoderLoss(vae, config, loop.seed, discriminator)
    players: dict[str, nn.Module] = {"autoencoder": stage}
    if discriminator is not None:
        players["discriminator"] = DiscriminatorLoss(discriminator, stage)
    pixels = cached_pixels(train, resolution, background)
    held_out = (
        pixels_to_images(cached_pixels(validation, resolution, background)[:256]) if len(validation) else None
    )
    shown = held_out if held_out is not None else pixels_to_images(pixels[:16])

    def validate() -> dict[str, float]:
        assert held_out is not None
        reconstruction = torch.cat(list(_reconstructions(vae, held_out)))
        figures = {"psnr": float(psnr(reconstruction, held_out).mean())}
        if resolution >= 11:
            figures["ssim"] = float(ssim(reconstruction, held_out).mean())
        return figures

    def export(folder: Path) -> None:
        sample = pixels_to_images(
            pixels[torch.linspace(0, len(pixels) - 1, min(len(pixels), _STATISTICS_IMAGES)).long()]
        )
        measure_statistics(vae, sample.split(64))
        with writing(f"the autoencoder {output / 'autoencoder'}", output):
            vae.save_pretrained(folder)
            carry_over(output / "autoencoder", folder)

    finished = fit(
        players,
        PixelData(train, pixels, flips=flips),
        loop,
        output,
        callbacks=Callbacks(
            validate=validate if held_out is not None else None,
            preview=lambda: reconstruction_grid(vae, shown[:16]),
            export=export,
            export_to=output / "autoencoder",
        ),
        description={
            "autoencoder": config.describe(),
            "resolution": resolution,
            "data": train.fingerprint(),
            "data_order": train.order(),
        },
        resume_line=resume_line,
        phase="train the autoencoder",
        stop=stop,
    )
    return load_autoencoder(output / "autoencoder") if finished else None


def autoencoder_loop(config: AutoencoderConfig, loop: LoopConfig) -> LoopConfig:
    """The loop's settings for the autoencoder."""
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


def reconstruction_grid(vae: Autoencoder, images: Tensor) -> Image.Image:
    """Originals above their reconstructions, up to 16 pairs: (B, 3, H, W) in [-1, 1] -> image."""
    rows = torch.cat([images, torch.cat(list(_reconstructions(vae, images)))])
    return to_pil(make_grid(rows.clamp(-1, 1), nrow=len(images), padding=2, pad_value=1.0))


def _reconstructions(vae: Autoencoder, images: Tensor) -> Iterator[Tensor]:
    """Posterior means decoded, in batches, on the CPU."""
    with torch.no_grad():
        for batch in images.split(32):
            yield decode(vae, encode(vae, batch)).cpu()


def autoencoder_for(
    given: str | None,
    training: Source,
    validation: Source,
    config: AutoencoderConfig,
    loop: LoopConfig,
    output: Path,
    *,
    data: DataConfig,
    resume_line: str,
    untrained: bool = False,
    stop: Stop | None = None,
) -> Autoencoder | None:
    """The autoencoder of a run, frozen, with latent statistics; None if a signal stopped its training.

    A ``given`` one without per-channel statistics gets them measured on the training images. Without one, a new
    one is trained in ``output`` (only built if ``untrained``), and ``stop`` is told which signal came meanwhile.

    Raises:
        UserError: the resolution is not divisible by its downscale factor; the nearest valid one is named.
    """
    if given is None and untrained:
        return build_autoencoder(config, data.resolution)
    if given is None:
        if not (output / "autoencoder" / "config.json").is_file():
            log.info("autoencoder: none given, training one")
        vae = train_autoencoder(
            training,
            validation,
            config,
            loop,
            output,
            resolution=data.resolution,
            background=data.background,
            flips=data.random_flip,
            resume_line=resume_line,
            stop=stop,
        )
        return None if vae is None else vae.requires_grad_(False)
    vae = load_autoencoder(given).requires_grad_(False)
    check_resolution(data.resolution, downscale_factor(vae))
    if not has_statistics(vae) and not untrained:
        log.info("autoencoder: measuring its latent statistics on the data")
        some = training.subset(torch.linspace(0, len(training) - 1, min(len(training), 512)).long().tolist())
        measure_statistics(
            vae, pixels_to_images(cached_pixels(some, data.resolution, data.background)[:]).split(16)
        )
    return vae
