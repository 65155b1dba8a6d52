"""Encode images once, to train without them: `latentflow precompute DATA --vae AUTOENCODER -o LATENTS`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from latentflow.cli import parse, run
from latentflow.config import DataConfig, FramingConfig
from latentflow.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Encode images into a folder that `latentflow train` takes as DATA; run again, the same line resumes."""

    data: DataConfig
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """Folder of latents to write."""
    vae: str
    """Autoencoder of diffusers (folder or hub id). The folder of latents keeps a copy."""
    latents_as_is: bool = False
    """Scale the latents as the model does that --vae was published with; see `latentflow train`."""
    buckets: bool = False
    """Use several aspect ratios, each image at the one nearest to its own, so that little is cropped away."""
    patch_size: int = 2
    """With --buckets: largest patch size, in latent pixels, of the networks that will be trained on the latents."""
    pixels: bool = False
    """Store the resized images too, which inpainting needs."""
    batch_size: int = 64
    """Images that are encoded at once."""
    dry_run: bool = False
    """Print what would be written and how long it takes, then stop."""


def main(argv: Sequence[str] | None = None) -> None:
    """Encode images once, to train without them."""
    config = parse(Config, argv, prog="latentflow precompute")
    if config.data.validation != DataConfig.validation:
        raise UserError("--validation is chosen when training", "Leave it out here.")
    if config.data.balance_classes:
        raise UserError("--balance-classes is chosen when training", "Leave it out here.")

    from latentflow.autoencoder import downscale_factor, load_autoencoder
    from latentflow.data import crop, find_source, fingerprint, readable
    from latentflow.data.sources.precomputing import (
        Precomputation,
        own_autoencoder,
        plan_latents,
        write_latents,
    )
    from latentflow.training import log_to, resume_line
    from latentflow.training.data import given_autoencoder
    from latentflow.training.loop.distributed import process_state

    data, output, device = config.data, Path(config.output), process_state().device
    log = log_to(None)

    # ---- data ----
    source = readable(find_source(data.data, **data.wanted()))
    for note in source.notes:
        log.info(f"{source.name}: {note}")
    if source.root is not None and output.resolve().is_relative_to(source.root.resolve()):
        raise UserError(f"{output} lies inside the data {source.root}", "Use an output folder outside of it.")

    # ---- autoencoder: as given, with statistics ----
    given = fingerprint(load_autoencoder(config.vae)) + (" as is" if config.latents_as_is else "")
    own = str(own_autoencoder(output, given) or config.vae)
    vae = given_autoencoder(own, source, data, measured=not config.latents_as_is)

    # ---- latents ----
    unit = downscale_factor(vae) * config.patch_size
    framing = FramingConfig(buckets=config.buckets)
    # With sizes, for --size-conditioning.
    framed = crop(source, data.resolution, unit, framing, size_conditioning=True)
    if config.buckets:
        for line in framed.lines():
            log.info(line)
    job = Precomputation(
        framing=framed,
        vae=vae,
        data=data,
        pixels=config.pixels,
        given=given,
        batch_size=config.batch_size,
        device=device,
    )
    if config.dry_run:
        for line in plan_latents(job, output):
            log.info(line)
        return
    try:
        write_latents(job, output)
    except OSError as error:
        raise UserError(
            f"{output} cannot be written: {error}",
            f"What is complete is kept. Make room, then:\n  {resume_line('precompute', argv)}",
        ) from error
    log.info(f"done: {output}; train with\n  latentflow train {output} -o RUN")


if __name__ == "__main__":
    run(main)
