"""Which autoencoder a run uses: a given one, or one trained on the data."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from ...autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    build_autoencoder,
    check_resolution,
    downscale_factor,
    has_statistics,
    load_autoencoder,
    measure_statistics,
)
from ...data import Source, cached_pixels, pixels_to_images
from ...data.config import DataConfig
from ..loop.config import LoopConfig
from ..loop.signals import Stop
from .autoencoder import train_autoencoder

log = logging.getLogger(__name__)


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

    A ``given`` one without per-channel statistics gets them measured on the training pictures. Without one, a new
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
